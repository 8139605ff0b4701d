"""From what a diffusers network predicts to an x0 estimate, and the weight that turns x0 errors into its native loss."""

from typing import Literal

from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "flow"]


def predicted_x0(prediction: Prediction, output: Tensor, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x0 from a network's raw output at `noisy = alpha x0 + sigma noise`.

    epsilon: (noisy - sigma out) / alpha; v = alpha noise - sigma x0: alpha noisy - sigma out; flow = noise - x0:
    noisy - sigma out. Sources: Ho et al. 2020 (arXiv:2006.11239); Salimans & Ho 2022 (arXiv:2202.00512), appendix D;
    Esser et al. 2024 (arXiv:2403.03206).

    Args:
        output, noisy: (B, ...); alpha, sigma: broadcastable. The result has their common precision.
    """
    if prediction == "epsilon":
        return (noisy - sigma * output) / alpha
    if prediction == "v_prediction":
        return alpha * noisy - sigma * output
    return noisy - sigma * output


def scaled_prediction(prediction: Prediction, x0: Tensor, noisy: Tensor, alpha: Tensor) -> Tensor:
    """sigma times the raw output that `predicted_x0` makes this x0 of; alike for all x0 at one `noisy` and level."""
    if prediction == "epsilon":
        return noisy - alpha * x0
    return (alpha * noisy if prediction == "v_prediction" else noisy) - x0


def x0_of_scaled(prediction: Prediction, scaled: Tensor, noisy: Tensor, alpha: Tensor) -> Tensor:
    """Inverse of `scaled_prediction`."""
    if prediction == "epsilon":
        return (noisy - scaled) / alpha
    return (alpha * noisy if prediction == "v_prediction" else noisy) - scaled


def native_denoising_weight(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Weight (B,) that turns the squared x0 error into the mean squared error of the raw prediction.

    alpha^2 / sigma^2 for epsilon, 1 / sigma^2 for v and flow (finite where alpha is 0).
    """
    return (alpha / sigma) ** 2 if prediction == "epsilon" else sigma**-2
