"""DMD's regression loss against stored samples of the teacher."""

from collections.abc import Callable

from torch import Tensor

from fewstep.losses.checks import require_same_shape


def regression_loss(x0: Tensor, target: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean perceptual distance between the generator's images and the teacher's from the same noise.

    Source: Yin et al. 2023, arXiv:2311.18828, eq. 9.

    Args:
        x0: generator output, (B, C, H, W), in [-1, 1]; receives gradient.
        target: the teacher's deterministic samples for the same noise and condition, same shape.
        distance: (images, images) -> (B,), e.g. LPIPS.

    Returns:
        float32 scalar.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(x0=x0, target=target)
    return distance(x0, target).mean()
