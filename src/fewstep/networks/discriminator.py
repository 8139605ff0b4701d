"""The GAN head that reads the fake score's bottleneck feature."""

import torch
from torch import Tensor, nn


def discriminator_groups(channels: int) -> int:
    """GroupNorm groups of the head: 32, or fewer where 32 would leave under four channels a group.

    At 1x1 pixels a group of one channel normalises to a constant and one of two to a sign, so the head would
    have no gradient.
    """
    groups = 32
    while groups > 1 and (channels % groups or channels // groups < 4):
        groups //= 2
    return groups


class Discriminator(nn.Sequential):
    """Head of DMD2: 4x4 stride-2 convolutions down to 4x4, one valid convolution to 1x1, a 1x1 to one logit.

    Every convolution but the last keeps C and is followed by GroupNorm and SiLU. Other sides than powers of two:
    halve while the larger side exceeds 4, then one valid convolution of whatever size is left.
    Source: DMD2 (arXiv:2405.14867), appendix on ImageNet; sizes from the published settings.

    Args:
        shape: (C, H, W) of the bottleneck feature.

    Forward: (B, C, H, W) -> logits (B,), float32 (float64 where the feature is).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        channels, height, width = shape
        layers: list[nn.Module] = []

        def add(kernel: tuple[int, int], stride: int, padding: int) -> None:
            layers.append(nn.Conv2d(channels, channels, kernel, stride, padding))
            layers.append(nn.GroupNorm(discriminator_groups(channels), channels, eps=1e-5))
            layers.append(nn.SiLU())

        while max(height, width) > 4:
            add((4, 4), 2, 1)
            height, width = height // 2, width // 2
        add((height, width), 1, 0)
        layers.append(nn.Conv2d(channels, 1, 1))
        super().__init__(*layers)

    def forward(self, feature: Tensor) -> Tensor:
        logits = super().forward(feature.to(torch.promote_types(feature.dtype, torch.float32)))
        return logits.flatten(1).squeeze(1).clone()  # a view would lose its sharding hook to an operation in place
