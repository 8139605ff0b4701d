"""The distribution-matching gradient: move samples from where the fake score sees them to where the teacher does."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.losses.checks import require_same_shape


def distribution_matching_gradient(x0: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """(fake_x0 - real_x0) / mean_{C,H,W} |x0 - real_x0|, per sample.

    Source: Yin et al. 2023, arXiv:2311.18828, eq. 7; normalised per sample as in its eq. 8.
    Differs: where x0 equals real_x0 everywhere the paper divides by zero; the gradient is 0 there.

    Args:
        x0: generator output, (B, C, H, W).
        real_x0, fake_x0: the teacher's and the fake score's x0 estimates at one noise level, same shape.

    Returns:
        (B, C, H, W), float32, no gradient attached. A descent step along it moves x0 toward real_x0.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(x0=x0, real_x0=real_x0, fake_x0=fake_x0)
    with torch.no_grad():
        scale = (x0 - real_x0).abs().mean(dim=(1, 2, 3), keepdim=True)
        direction = (fake_x0 - real_x0) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
        return torch.where(scale == 0, 0.0, direction)  # NaN stays NaN, so that a diverging network is noticed


def distribution_matching_loss(x0: Tensor, gradient: Tensor) -> Tensor:
    """Scalar whose gradient with respect to x0 is `gradient / numel`: 0.5 mse(x0, stop_grad(x0 - gradient)).

    Source: Yin et al. 2023, arXiv:2311.18828, section 3.2.

    Args:
        x0: generator output, (B, C, H, W); the only input that receives gradient.
        gradient: `distribution_matching_gradient`, same shape.

    Returns:
        float32 scalar.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(x0=x0, gradient=gradient)
    return 0.5 * F.mse_loss(x0, (x0 - gradient).detach())
