"""Latents of 32 channels as the 2x2 patches of 128 channels that the network and the batch norm of the VAE take."""

from torch import Tensor


def patches(latents: Tensor) -> Tensor:
    """Latents (B, C, 2 h, 2 w) as (B, 4 C, h, w): the channels of one patch are c, then row, then column."""
    size, channels, height, width = latents.shape
    split = latents.reshape(size, channels, height // 2, 2, width // 2, 2)
    return split.permute(0, 1, 3, 5, 2, 4).reshape(size, 4 * channels, height // 2, width // 2)


def whole(packed: Tensor) -> Tensor:
    """Inverse of `patches`."""
    size, channels, height, width = packed.shape
    split = packed.reshape(size, channels // 4, 2, 2, height, width)
    return split.permute(0, 1, 4, 2, 5, 3).reshape(size, channels // 4, 2 * height, 2 * width)
