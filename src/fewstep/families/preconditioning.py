"""From what a network predicts to an x0 estimate, and the weight that turns x0 errors into its native loss."""

from typing import Literal, NamedTuple

from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "flow"]


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


def predicted_x0(prediction: Prediction, output: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x0 from a network's raw output at `noisy = alpha x0 + sigma noise`.

    epsilon: (noisy - sigma out) / alpha; v = alpha noise - sigma x0: alpha noisy - sigma out; flow = noise - x0:
    noisy - sigma out. Sources: Ho et al. 2020 (arXiv:2006.11239); Salimans & Ho 2022 (arXiv:2202.00512), appendix D;
    Esser et al. 2024 (arXiv:2403.03206).

    Args:
        output, noisy: (B, C, H, W); alpha, sigma: broadcastable. The result has their common precision.
    """
    if prediction == "epsilon":
        return (noisy - sigma * output) / alpha
    if prediction == "v_prediction":
        return alpha * noisy - sigma * output
    return noisy - sigma * output


def native_denoising_weight(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Weight (B,) that turns the squared x0 error into the mean squared error of the raw prediction.

    alpha^2 / sigma^2 for epsilon, 1 / sigma^2 for v and flow (finite where alpha is 0).
    """
    return (alpha / sigma) ** 2 if prediction == "epsilon" else sigma**-2
