"""The VAE of Qwen-Image: one of videos, for which a picture is a video of one frame."""

import math
from typing import Any

import torch
from torch import Tensor

from fewstep.networks.autoencoder import Autoencoder


class QwenImageAutoencoder(Autoencoder):
    """An `AutoencoderKLQwenImage`; latents (B, C, h, w), each channel normalised by the mean and deviation in its config."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        for name, key in (("mean", "latents_mean"), ("deviation", "latents_std")):
            values = [float(value) for value in vae.config[key]]
            if len(values) != self.latent_channels or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{key} is not {self.latent_channels} numbers")
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
        if min(vae.config["latents_std"]) <= 0:
            raise ValueError("latents_std has a value that is not above 0")

    def decode(self, latents: Tensor) -> Tensor:
        frames = (latents * self.deviation + self.mean).unsqueeze(2)
        return self.vae.decode(frames).sample[:, :, 0].float()

    @torch.no_grad()
    def distribution(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found: Any = self.vae.encode(images.unsqueeze(2)).latent_dist
        mean, spread = found.mean[:, :, 0].float(), found.std[:, :, 0].float()
        return (mean - self.mean) / self.deviation, spread / self.deviation

    @staticmethod
    def geometry(config: Any) -> tuple[int, int]:
        return int(config.z_dim), 2 ** len(config.temperal_downsample)
