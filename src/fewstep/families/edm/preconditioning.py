"""EDM's preconditioning, and the weight that turns x0 errors into its native loss."""

from typing import NamedTuple

from torch import Tensor


class Preconditioning(NamedTuple):
    """Coefficients (B,) of D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def edm_preconditioning(sigma: Tensor, sigma_data: float) -> Preconditioning:
    """Coefficients for noise levels sigma (B,), sigma > 0.

    Source: Karras et al. 2022 (arXiv:2206.00364), table 1.
    """
    variance = sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / variance
    c_out = sigma * sigma_data / variance.sqrt()
    c_in = 1 / variance.sqrt()
    c_noise = sigma.log() / 4
    return Preconditioning(c_skip, c_out, c_in, c_noise)


def edm_denoising_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """1 / c_out^2 = sigma^-2 + sigma_data^-2, (B,): weights the squared x0 error into EDM's training loss."""
    return sigma**-2 + sigma_data**-2
