"""One number a sample against tensors of any number of axes: nothing else in the library counts axes."""

import torch
from torch import Tensor


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) so that it broadcasts over the trailing dimensions of `like` (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def mean_per_sample(x: Tensor) -> Tensor:
    """Mean over everything but the batch, (B, 1, ...), which broadcasts against `x` (B, ...)."""
    return x.mean(dim=tuple(range(1, x.ndim)), keepdim=True)


def twice(x: Tensor) -> Tensor:
    """The batch (B, ...) followed by itself, (2B, ...): both branches of guidance in one forward."""
    return torch.cat([x, x])
