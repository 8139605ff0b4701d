"""EDM networks: pictures from class labels or from nothing, in pixels."""

from pathlib import Path

from torch import Tensor

from fewstep.diffusion.condition import ClassTable, Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.samplers import heun_evaluations, sample_heun
from fewstep.errors import UserError
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.families.edm.folder import describe_edm_folder, is_edm_folder, load_edm, read_edm_card
from fewstep.families.edm.shapes import released_descriptions
from fewstep.families.family import Description, Family
from fewstep.formats.model_folder import ModelCard


class EDMFamily(Family):
    """Networks with EDM's preconditioning, ADM or Song, in our own folders or in EDM pickles."""

    name = "edm"
    title = "EDM"
    takes = "labels"
    sampler_name = "Heun"
    default_num_steps = 18
    default_batch_size = 64
    shapes = released_descriptions()

    def recognise(self, folder: Path) -> bool:
        return is_edm_folder(folder)

    def describes(self, description: Description) -> bool:
        return description.get("family") == "edm"

    def build(self, description: Description) -> Denoiser:
        return EDMDenoiser.from_description(description)

    def load(self, folder: Path, resolution: int = 0) -> Denoiser:
        return load_edm(folder)

    def describe_folder(self, folder: Path, resolution: int = 0) -> Description:
        return describe_edm_folder(folder)

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
        import torch

        return ClassTable(denoiser.num_classes).rows(torch.zeros(size, dtype=torch.int64))
