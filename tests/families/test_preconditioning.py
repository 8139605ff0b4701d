import math

import pytest
import torch

from fewstep.diffusion.condition import Condition
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.families.edm.preconditioning import edm_denoising_weight, edm_preconditioning
from fewstep.families.prediction import Prediction, native_denoising_weight, predicted_x0
from tests.conftest import tiny_denoiser

SIGMAS = torch.tensor([0.002, 0.01, 0.3, 0.5, 2, 80], dtype=torch.float64)
DATA_STDS = [0.25, 0.5, 1.0]


@pytest.mark.parametrize("sigma_data", DATA_STDS)
def test_coefficients_of_one_level(sigma_data: float) -> None:
    for sigma, *actual in zip(SIGMAS.tolist(), *edm_preconditioning(SIGMAS, sigma_data), strict=True):
        root = math.hypot(sigma, sigma_data)
        expected = (sigma_data / root) ** 2, sigma * sigma_data / root, 1 / root, math.log(sigma) / 4
        assert [float(value) for value in actual] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sigma_data", DATA_STDS)
def test_without_noise_the_input_passes_through(sigma_data: float) -> None:
    sigma = torch.tensor([1e-8], dtype=torch.float64)
    c = edm_preconditioning(sigma, sigma_data)
    assert c.c_skip.item() == pytest.approx(1)
    assert (c.c_out / sigma).item() == pytest.approx(1)
    assert c.c_in.item() == pytest.approx(1 / sigma_data)


@pytest.mark.parametrize("sigma_data", DATA_STDS)
def test_under_endless_noise_the_network_answers_alone(sigma_data: float) -> None:
    sigma = torch.tensor([1e8], dtype=torch.float64)
    c = edm_preconditioning(sigma, sigma_data)
    assert (c.c_skip * sigma**2).item() == pytest.approx(sigma_data**2)
    assert c.c_out.item() == pytest.approx(sigma_data)
    assert (c.c_in * sigma).item() == pytest.approx(1)


@pytest.mark.parametrize("sigma_data", DATA_STDS)
def test_network_input_and_target_have_unit_variance(sigma_data: float) -> None:
    c = edm_preconditioning(SIGMAS, sigma_data)
    one = torch.ones_like(SIGMAS)
    torch.testing.assert_close(c.c_in**2 * (sigma_data**2 + SIGMAS**2), one)
    # target (x0 - c_skip noisy) / c_out, with x0 and noise independent
    target_variance = ((1 - c.c_skip) ** 2 * sigma_data**2 + c.c_skip**2 * SIGMAS**2) / c.c_out**2
    torch.testing.assert_close(target_variance, one)


@pytest.mark.parametrize("sigma_data", DATA_STDS)
def test_skip_is_the_best_linear_guess(sigma_data: float) -> None:
    c_skip = edm_preconditioning(SIGMAS, sigma_data).c_skip

    def remaining_error(skip: torch.Tensor) -> torch.Tensor:
        return (1 - skip) ** 2 * sigma_data**2 + skip**2 * SIGMAS**2

    for other in (c_skip * 0.99, c_skip * 1.01):
        assert (remaining_error(c_skip) < remaining_error(other)).all()


def test_measured_variance_of_the_network_input_is_one() -> None:
    torch.manual_seed(0)
    x0, noise = 0.5 * torch.randn(200_000), torch.randn(200_000)
    for sigma in (0.1, 0.5, 5.0):
        c_in = edm_preconditioning(torch.tensor([sigma]), 0.5).c_in
        assert (c_in * (x0 + sigma * noise)).var().item() == pytest.approx(1, abs=0.015)


@pytest.mark.parametrize("sigma_data", DATA_STDS)
def test_weight_is_one_over_c_out_squared(sigma_data: float) -> None:
    weight = edm_denoising_weight(SIGMAS, sigma_data)
    torch.testing.assert_close(weight, edm_preconditioning(SIGMAS, sigma_data).c_out ** -2)
    torch.testing.assert_close(weight, (SIGMAS**2 + sigma_data**2) / (SIGMAS * sigma_data) ** 2)


@pytest.mark.parametrize("sigma_data", [0.5, 0.8])
def test_edm_denoiser_is_the_formula_around_its_raw_network(sigma_data: float) -> None:
    network = tiny_denoiser().double()
    denoiser = EDMDenoiser(network.config, sigma_data).double()
    denoiser.load_state_dict(network.state_dict())
    condition = Condition.from_one_hot(torch.eye(4, dtype=torch.float64))
    level = torch.tensor([0.002, 0.4, 3, 80], dtype=torch.float64)
    noisy = torch.randn(4, 1, 16, 16, dtype=torch.float64) * level[:, None, None, None]
    with torch.no_grad():
        out = denoiser(noisy, level, condition, "both")
        for i, sigma in enumerate(level.tolist()):
            root = math.hypot(sigma, sigma_data)
            c_noise = torch.tensor([math.log(sigma) / 4], dtype=torch.float64)
            one = slice(i, i + 1)
            raw, (feature,) = denoiser.model(noisy[one] / root, c_noise, condition[one]["class_labels"], "both")
            expected = (sigma_data / root) ** 2 * noisy[one] + sigma * sigma_data / root * raw
            torch.testing.assert_close(out.x0[one], expected, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(out.features[0][one], feature)
    torch.testing.assert_close(denoiser.denoising_weight(level), level**-2 + sigma_data**-2)


# --- Epsilon-, v- and flow-prediction

ANGLES = torch.tensor([0.02, 0.3, 0.8, 1.2, 1.5], dtype=torch.float64)


def levels_of(prediction: Prediction) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma of five levels, (5, 1, 1, 1): on the circle, or on the straight path."""
    alpha, sigma = ANGLES.cos(), ANGLES.sin()
    if prediction == "flow":
        alpha, sigma = 1 - ANGLES / 1.6, ANGLES / 1.6
    return alpha[:, None, None, None], sigma[:, None, None, None]


def native_target(
    prediction: Prediction, x0: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """What a perfect network of this kind would predict."""
    return {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "flow": noise - x0}[prediction]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_a_perfect_prediction_gives_x0_back(prediction: Prediction) -> None:
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64)
    alpha, sigma = levels_of(prediction)
    output = native_target(prediction, x0, noise, alpha, sigma)
    found = predicted_x0(prediction, output, alpha * x0 + sigma * noise, alpha, sigma)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, x0, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_weighted_x0_error_is_the_native_error(prediction: Prediction) -> None:
    """Of any output, not only a good one; per sample, to the last digits of float64."""
    torch.manual_seed(1)
    x0, noise, output = torch.randn(3, 5, 4, 3, 3, dtype=torch.float64)
    alpha, sigma = levels_of(prediction)
    estimate = predicted_x0(prediction, output, alpha * x0 + sigma * noise, alpha, sigma)
    weight = native_denoising_weight(prediction, alpha.flatten(), sigma.flatten())
    assert weight.shape == (5,)
    ours = weight * (estimate - x0).square().mean(dim=(1, 2, 3))
    native = (output - native_target(prediction, x0, noise, alpha, sigma)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(ours, native, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("prediction", "expected"), [("v_prediction", "-output"), ("flow", "noisy - output")])
def test_without_signal_v_and_flow_stay_finite(prediction: Prediction, expected: str) -> None:
    noisy, output = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64)
    alpha, sigma = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    x0 = predicted_x0(prediction, output, noisy, alpha, sigma)
    torch.testing.assert_close(x0, -output if expected == "-output" else noisy - output)
    assert native_denoising_weight(prediction, alpha, sigma).item() == 1


def test_without_signal_epsilon_says_nothing_about_x0() -> None:
    """Why such models are refused."""
    one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert not predicted_x0("epsilon", 2 * one, one, none, one).isfinite().any()
    assert native_denoising_weight("epsilon", none, one).item() == 0
