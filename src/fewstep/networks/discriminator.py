"""The GAN heads that read the fake score's features."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Of a light head: at DMD2's full width a 4x4 convolution of Z-Image's 3,840 channels has 236 M weights, at 256 it has 1 M, as many as
# projecting them does. 256 is a third of ImageNet-64's published 768, and leaves GroupNorm's 32 groups eight channels each.
LIGHT_WIDTH = 256


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
        shape: (C, H, W) of the feature.
        width: channels above it are projected to it first, by a 1x1 convolution with GroupNorm and SiLU; 0: never.

    Forward: (B, C, H, W) -> logits (B,), float32 (float64 where the feature is).
    """

    def __init__(self, shape: tuple[int, ...], width: int = 0) -> None:
        channels, rows, columns = shape
        layers: list[nn.Module] = []

        def add(inputs: int, kernel: tuple[int, int], stride: int, padding: int) -> None:
            layers.append(nn.Conv2d(inputs, channels, kernel, stride, padding))
            layers.append(nn.GroupNorm(discriminator_groups(channels), channels, eps=1e-5))
            layers.append(nn.SiLU())

        if 0 < width < channels:
            inputs, channels = channels, width
            add(inputs, (1, 1), 1, 0)
        while max(rows, columns) > 4:
            add(channels, (4, 4), 2, 1)
            rows, columns = rows // 2, columns // 2
        add(channels, (rows, columns), 1, 0)
        layers.append(nn.Conv2d(channels, 1, 1))
        super().__init__(*layers)

    def forward(self, feature: Tensor) -> Tensor:
        logits = super().forward(feature.to(torch.promote_types(feature.dtype, torch.float32)))
        return logits.flatten(1).squeeze(1).clone()  # a view would lose its sharding hook to an operation in place


class TapDiscriminator(nn.Module):
    """A light head for each of several features, none of which knows of the others.

    Each is a discriminator of its own, whose loss is averaged with the others' (as the mean over all logits is), so that
    the published GAN weights keep their meaning. Source: one independent head a depth as in LADD (arXiv:2403.12015) and
    Projected GAN (arXiv:2111.01007). Differs: the mean where these add up; the heads are DMD2's behind a projection to at
    most `LIGHT_WIDTH` channels, which is ours.

    Args:
        shapes: (C, H, W) of each feature.

    Forward: features (B, C, H, W), one a shape -> logits (B, number of features), float32 (float64 where the features are).
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Discriminator(shape, LIGHT_WIDTH) for shape in shapes)

    def forward(self, *features: Tensor) -> Tensor:
        return torch.stack([head(feature) for head, feature in zip(self.heads, features, strict=True)], 1)


Head = Discriminator | TapDiscriminator


def build_head(shapes: Sequence[tuple[int, ...]]) -> Head:
    """DMD2's own head for one feature, of its full width; light heads for several."""
    return Discriminator(shapes[0]) if len(shapes) == 1 else TapDiscriminator(shapes)


def log_ratio(logits: Tensor) -> Tensor:
    """(B,) of data's and generator's densities, from the logits (B,) or (B, number of features): the heads' mean estimate."""
    return logits.flatten(1).mean(1) if logits.dim() > 1 else logits
