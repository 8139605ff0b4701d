"""What a rehearsed run reads instead of files: conditions, pairs, a VAE and a distance of the right shapes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.condition import ClassTable, Condition, ConditionTable
from fewstep.diffusion.denoiser import Denoiser
from fewstep.formats.model_folder import ModelCard
from fewstep.models.model import AnyTeacher, Teacher
from fewstep.networks.perceptual import LPIPS, pixel_distance
from fewstep.settings import TrainSettings


@dataclass(frozen=True)
class Prompts:
    """Embeddings of any prompt, of one network's shapes."""

    text: tuple[int, int]
    pooled: int
    has_time_ids: bool
    num_rows: int = 1

    def rows(self, index: Tensor) -> Condition:
        size = len(index)
        pooled, empty = (torch.zeros(rows, self.pooled) if self.pooled else None for rows in (size, 1))
        return Condition(
            size, None, torch.zeros(size, *self.text), pooled, torch.zeros(size, 6) if self.has_time_ids else None,
            torch.zeros(1, *self.text), empty,
        )  # fmt: skip


@dataclass(frozen=True)
class Pairs:
    """Noise-image pairs of one shape."""

    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return 1

    def rows(self, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros(len(index), *self.shape), torch.zeros(len(index), *self.shape), torch.zeros_like(index)


def conditions_of(denoiser: Denoiser) -> ConditionTable:
    """Conditions of the shapes that a network reads."""
    network = getattr(denoiser, "network", None)
    if network is None:
        return ClassTable(denoiser.num_classes)
    config: Any = network.config
    if hasattr(config, "joint_attention_dim"):  # SD 3: 77 tokens of CLIP, 256 of T5
        return Prompts((77 + 256, config.joint_attention_dim), config.pooled_projection_dim, False)
    width = config.cross_attention_dim
    if config.addition_embed_type is None:
        return Prompts((77, width), 0, False)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return Prompts((77, width), pooled, True)


def teacher_of(network: Denoiser) -> AnyTeacher:
    """A teacher around a network, without a folder to read anything else from."""
    card = ModelCard(role="teacher", can_be_guided=True)
    if getattr(network, "network", None) is None:
        return Teacher(network, card)
    from fewstep.models.text_model import TextTeacher

    return TextTeacher(network, card, Path(), "", "")


def untrained_autoencoder(config: dict[str, Any]) -> Any:
    """The VAE of a text-to-image model, from its config."""
    from diffusers import AutoencoderKL

    from fewstep.networks.autoencoder import Autoencoder

    return Autoencoder(AutoencoderKL.from_config(config))


def untrained_distance(settings: TrainSettings, teacher: AnyTeacher, vae: Any) -> Any:
    """The regression's distance with untrained weights; latents are decoded before LPIPS."""
    if settings.losses.regression_distance == "pixel":
        return pixel_distance
    lpips = LPIPS()
    if isinstance(teacher, Teacher) or vae is None:
        return lpips
    decoder = vae
    if settings.losses.regression_autoencoder:  # a small one, as TAESD
        from diffusers import AutoencoderTiny

        from fewstep.networks.autoencoder import Autoencoder

        decoder = Autoencoder(AutoencoderTiny(latent_channels=teacher.denoiser.image_shape[0]))
    return lambda x0, target: lpips(decoder.decode(x0), decoder.decode(target))
