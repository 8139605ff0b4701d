"""The denoising loss in x0 space, from which every parameterisation's native loss follows by a weight."""

from torch import Tensor

from fewstep.diffusion.noise_levels import per_sample
from fewstep.losses.checks import require_same_shape


def denoising_loss(estimate: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
    """Mean over all elements of weight * (estimate - x0)^2.

    Source: Karras et al. 2022, arXiv:2206.00364, eq. 2 with the weight of its table 1.

    Args:
        estimate: x0 estimate of the model in training, (B, C, H, W); receives gradient.
        x0: clean images, same shape.
        weight: `Denoiser.denoising_weight` at each sample's level, (B,).

    Returns:
        float32 scalar.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(estimate=estimate, x0=x0)
    return (per_sample(weight, x0) * (estimate - x0) ** 2).mean()
