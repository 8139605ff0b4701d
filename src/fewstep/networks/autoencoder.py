"""Pictures to latents and back, with the VAE of a diffusers folder."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from fewstep.diffusion.draws import Draws
from fewstep.errors import UserError, first_line
from fewstep.formats.json_files import read_json_object
from fewstep.networks.components import load_component


class Autoencoder(nn.Module):
    """A VAE in the model's own scaling of latents.

    Args:
        vae: of diffusers, an `AutoencoderKL`, `AutoencoderTiny` or the class of a family.

    Attributes:
        latent_channels: channels of the latents.
        factor: pixels a latent side stands for.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        config: Any = vae.config
        self.latent_channels, self.factor = self.geometry(config)
        self.scale = float(getattr(config, "scaling_factor", 1.0))
        self.shift = float(getattr(config, "shift_factor", 0.0) or 0.0)

    @staticmethod
    def geometry(config: Any) -> tuple[int, int]:
        """Channels of its latents, and pixels a side of them stands for."""
        widths = getattr(config, "block_out_channels", None) or config.encoder_block_out_channels
        return int(config.latent_channels), 2 ** (len(widths) - 1)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.vae.parameters()).device

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W), about [-1, 1], float32; differentiable."""
        return self.vae.decode(latents / self.scale + self.shift).sample.float()

    @torch.no_grad()
    def encode(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w), float32.

        Args:
            draws: where the encoder gives a distribution: sample it with these draws; None takes its mean.
        """
        mean, spread = self.distribution(images)
        return mean if draws is None else mean + spread * draws.normal("encoder_noise", tuple(mean.shape[1:]))

    @torch.no_grad()
    def distribution(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] to mean and standard deviation of their latents, each (B, C, h, w), float32.

        The deviation is 0 where the encoder gives latents and no distribution.
        """
        encoded: Any = self.vae.encode(images)
        if not hasattr(encoded, "latent_dist"):
            latents = (encoded.latents.float() - self.shift) * self.scale
            return latents, torch.zeros_like(latents)
        found = encoded.latent_dist
        return (found.mean.float() - self.shift) * self.scale, found.std.float() * self.scale


_COLOURS = 3
PLAIN: Mapping[str, type[Autoencoder]] = {"AutoencoderKL": Autoencoder, "AutoencoderTiny": Autoencoder}


def load_autoencoder(folder: Path, classes: Mapping[str, type[Autoencoder]] = PLAIN) -> Autoencoder:
    """The VAE of a diffusers folder (its `vae` component, or the folder itself), float32.

    Args:
        classes: {class of diffusers that it may be: how its latents are scaled}.

    Raises:
        UserError: there is none, it is damaged, or its weights are another's.
    """
    path = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (path / "config.json").is_file():
        raise UserError(f"{folder} is incomplete: its component vae is missing; download it again")
    config = read_json_object(path / "config.json")
    name, scale = str(config.get("_class_name") or ""), config.get("scaling_factor", 1.0)
    if name not in classes:
        raise UserError(
            f"{folder}: its vae is a {name[:60] if name else 'component without _class_name'}; {' and '.join(classes)} {'are' if len(classes) > 1 else 'is'} read"
        )
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise UserError(
            f"{path / 'config.json'} is damaged: scaling_factor is {str(scale)[:40]}, not a number above 0; download it again"
        )
    for key in ("in_channels", "out_channels"):
        if config.get(key, _COLOURS) != _COLOURS:
            raise UserError(
                f"{folder}: its vae has {key}={config[key]!r:.40}; pictures of {_COLOURS} channels are read and made here"
            )
    vae = load_component(getattr(diffusers, name), path).float()
    try:
        return classes[name](vae)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path / 'config.json'} is damaged ({first_line(error)}); download it again") from error
