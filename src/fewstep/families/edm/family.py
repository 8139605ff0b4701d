"""EDM networks: pictures from class labels or from nothing, in pixels."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fewstep.diffusion.condition import ClassTable, Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.samplers import heun_evaluations, sample_heun
from fewstep.errors import UserError
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.families.edm.folder import describe_edm_folder, is_edm_folder, load_edm, read_edm_card
from fewstep.families.edm.pickle import write_edm_file
from fewstep.families.edm.shape_from_weights import edm_config_from_weights
from fewstep.families.edm.shapes import build_network_config, network_names, released_descriptions
from fewstep.families.edm.unet import EDMUNetConfig
from fewstep.families.family import Description, Family, NewNetwork
from fewstep.formats.model_folder import WEIGHTS, ModelCard
from fewstep.formats.stored_tensors import StoredTensors, find_tensors

_SIGN = "model.map_layer0.weight"  # only EDM's own networks have such a layer


def _description(config: EDMUNetConfig, sigma_data: float = 0.5) -> Description:
    return {"family": "edm", "sigma_data": sigma_data, "network": config.to_dict()}


class EDMFamily(Family):
    """Networks with EDM's preconditioning, ADM or Song, in our own folders or in EDM pickles."""

    name = "edm"
    title = "EDM"
    takes = "labels"
    sampler_name = "Heun"
    default_num_steps = 18
    default_batch_size = 64
    shapes = released_descriptions()
    new_shapes = tuple(network_names())

    def recognise(self, folder: Path) -> bool:
        return is_edm_folder(folder)

    def describes(self, description: Description) -> bool:
        return description.get("family") == "edm"

    def build(self, description: Description) -> Denoiser:
        return EDMDenoiser.from_description(description)

    def load(self, folder: Path, resolution: int = 0) -> Denoiser:
        return load_edm(folder)

    def stored_weights(self, folder: Path) -> StoredTensors | None:
        return None if folder.is_file() else find_tensors([folder / WEIGHTS])

    def describe_folder(self, folder: Path, resolution: int = 0) -> Description:
        return describe_edm_folder(folder)

    def describe_weights(self, weights: Mapping[str, Tensor]) -> Description | None:
        return None if _SIGN not in weights else _description(edm_config_from_weights(weights))

    def describe_new(self, name: str, pictures: NewNetwork) -> Description:
        shape = (pictures.resolution, pictures.channels, pictures.num_classes)
        config = build_network_config(name, img_resolution=shape[0], img_channels=shape[1], label_dim=shape[2])
        return _description(config, pictures.sigma_data)

    def write_original(self, path: Path, denoiser: Denoiser, dtype: torch.dtype) -> None:
        write_edm_file(path, cast(EDMDenoiser, denoiser), dtype)

    def resolution(self, folder: Path) -> int:
        return int(describe_edm_folder(folder)["network"]["img_resolution"])

    def read_card(self, folder: Path) -> ModelCard:
        return read_edm_card(folder)

    def evaluations(self, num_steps: int) -> int:
        return heun_evaluations(num_steps)

    def sample(
        self, denoiser: Denoiser, noise: Tensor, condition: Condition, *, num_steps: int, guidance_scale: float
    ) -> Tensor:
        return sample_heun(denoiser, noise, condition, num_steps=num_steps, guidance_scale=guidance_scale)

    def refuse_guidance(self, denoiser: Denoiser, card: ModelCard, guidance_scale: float) -> None:
        if guidance_scale == 1:
            return
        if not denoiser.num_classes:
            raise UserError(f"guidance_scale={guidance_scale}: this teacher has no condition to guide; use 1")
        if not card.can_be_guided:
            raise UserError(
                f"guidance_scale={guidance_scale}: this teacher was trained without label dropout and has no "
                "unconditional branch; use 1, or train one with network.label_dropout=0.1"
            )

    def example_condition(self, denoiser: Denoiser, size: int) -> Condition:
        return ClassTable(denoiser.num_classes).rows(torch.zeros(size, dtype=torch.int64))
