"""What a rehearsed run reads instead of files: conditions, pairs, a VAE and a distance of the right shapes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.condition import ClassTable, Condition, ConditionTable
from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.families.registry import build_on_meta, build_released, family_of, recognise
from fewstep.formats.bundled import resolve_path
from fewstep.formats.model_folder import ModelCard
from fewstep.models.decoder import LatentDecoder
from fewstep.models.model import Model, build_model
from fewstep.networks.perceptual import LPIPS, pixel_distance
from fewstep.settings import TrainSettings


@dataclass(frozen=True)
class Prompts:
    """Embeddings of any prompt, of one network's shapes."""

    denoiser: Denoiser
    num_rows: int = 1
    noun: str = "prompts"
    on_host: bool = False

    def names(self, index: Tensor) -> list[str]:
        """Nothing: no prompt is known."""
        return []

    def rows(self, index: Tensor, device: torch.device | None = None) -> Condition:
        return family_of(self.denoiser.describe()).example_condition(self.denoiser, len(index))


@dataclass(frozen=True)
class Pairs:
    """Noise-image pairs of one shape."""

    shape: tuple[int, ...]

    def __len__(self) -> int:
        return 1

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros(len(index), *self.shape), torch.zeros(len(index), *self.shape), torch.zeros_like(index)


def conditions_of(denoiser: Denoiser) -> ConditionTable:
    """Conditions of the shapes that a network reads."""
    if family_of(denoiser.describe()).takes == "labels":
        return ClassTable(denoiser.num_classes)
    return Prompts(denoiser)


def teacher_of(network: Denoiser, autoencoder: Any = None) -> Model:
    """A teacher around a network and perhaps a VAE, without a folder to read anything else from."""
    teacher = build_model(network, ModelCard(role="teacher", can_be_guided=True))
    if autoencoder is not None:
        teacher.decoder = LatentDecoder.around(autoencoder)
    return teacher


def untrained_distance(settings: TrainSettings, teacher: Model) -> Any:
    """The regression's distance with untrained weights; latents are decoded before LPIPS."""
    if settings.losses.regression_distance == "pixel":
        return pixel_distance
    lpips, decoder = LPIPS(), teacher.decoder
    if settings.losses.regression_autoencoder:  # a small one, as TAESD
        from diffusers import AutoencoderTiny

        from fewstep.networks.autoencoder import Autoencoder

        tiny = AutoencoderTiny(latent_channels=teacher.denoiser.image_shape[0])
        decoder = LatentDecoder.around(Autoencoder(tiny))
    return lambda x0, target: lpips(decoder.pixels(x0), decoder.pixels(target))


def teacher_network(settings: TrainSettings) -> tuple[Denoiser, dict[str, Any] | None] | None:
    """The teacher on the meta device and its VAE's config: named in the recipe, or described by its folder."""
    teacher = settings.teacher
    if teacher.network:
        try:
            denoiser = build_released(teacher.network, teacher.resolution)
        except ValueError as error:
            raise UserError(str(error)) from None
        return denoiser, dict(family_of(denoiser.describe()).autoencoder_config) or None
    path = teacher.path
    if not path:
        return None
    folder = resolve_path(path)
    if (folder / "teacher").is_dir():
        folder = folder / "teacher"
    if not folder.is_dir():
        return None
    family = recognise(folder)
    description = family.describe_folder(folder, teacher.resolution)
    return build_on_meta(description), family.read_autoencoder_config(folder) or None
