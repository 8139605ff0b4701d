"""The VAE of FLUX.2: its latents are normalised patch by patch, with the running statistics of a batch norm."""

from typing import Any

import torch
from torch import Tensor

from fewstep.families.flux2_klein.packing import patches, whole
from fewstep.networks.autoencoder import Autoencoder


class Flux2Autoencoder(Autoencoder):
    """An `AutoencoderKLFlux2`; latents (B, 32, h, w), h and w even, each of the 128 values of a 2x2 patch normalised."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        if tuple(vae.config.patch_size) != (2, 2):
            raise ValueError(f"patch_size={vae.config.patch_size}, where latents are normalised in patches of 2x2")

    def decode(self, latents: Tensor) -> Tensor:
        mean, spread = self._statistics()
        return self.vae.decode(whole(patches(latents) * spread + mean)).sample.float()

    @torch.no_grad()
    def distribution(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found: Any = self.vae.encode(images).latent_dist
        mean, spread = self._statistics()
        return whole((patches(found.mean.float()) - mean) / spread), whole(patches(found.std.float()) / spread)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of patches, (1, 128, 1, 1)."""
        norm = self.vae.bn
        variance = norm.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps
        return norm.running_mean.view(1, -1, 1, 1), variance.sqrt()
