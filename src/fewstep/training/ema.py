"""The exponential moving average of a network's weights."""

from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from fewstep.distillation.sharding import local

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class WeightAverage(Generic[ModuleT]):
    """Average with a half-life counted in images, ramped up over the run's beginning.

    Source: Karras et al. 2022 (arXiv:2206.00364), table 7: half-life of 0.5 million images, ramp-up of 5%.

    Args:
        module: a network of its own with the weights that the average begins with.

    Attributes:
        module: the averaged network, in eval mode, without gradients.
    """

    def __init__(self, module: ModuleT, half_life_images: float, ramp_up: float = 0.05) -> None:
        self.module: ModuleT = module.eval().requires_grad_(False)
        self.half_life_images, self.ramp_up = half_life_images, ramp_up

    def decay(self, images_seen: int, batch_size: int) -> float:
        """Weight of the old average at one update of `batch_size` images after `images_seen` images."""
        half_life = min(self.half_life_images, images_seen * self.ramp_up)
        return 0.5 ** (batch_size / max(half_life, 1e-8))

    @torch.no_grad()
    def update(self, module: ModuleT, images_seen: int, batch_size: int, made: Tensor | None = None) -> None:
        """Move the average toward the weights of `module`; buffers are copied.

        Args:
            made: scalar 0 where the step before was not made, which leaves the average as it is too; None: it was.
        """
        share = 1 - self.decay(images_seen, batch_size)
        averaged = [local(parameter.detach()) for parameter in self.module.parameters()]
        current = [local(parameter.detach()) for parameter in module.parameters()]
        if made is None:
            torch._foreach_lerp_(averaged, current, share)
        else:  # a share on the device, which nobody waits for
            for mine, theirs in zip(averaged, current, strict=True):
                mine.lerp_(theirs, (share * made).to(mine.dtype))
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)
