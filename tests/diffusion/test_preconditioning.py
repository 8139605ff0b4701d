import math

import pytest
import torch

from fewstep.backbones.edm_denoiser import EDMDenoiser
from fewstep.diffusion.condition import Condition
from fewstep.diffusion.preconditioning import edm_denoising_weight, edm_preconditioning
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
    condition = Condition(4, torch.eye(4, dtype=torch.float64))
    level = torch.tensor([0.002, 0.4, 3, 80], dtype=torch.float64)
    noisy = torch.randn(4, 1, 16, 16, dtype=torch.float64) * level[:, None, None, None]
    with torch.no_grad():
        out = denoiser(noisy, level, condition, "both")
        for i, sigma in enumerate(level.tolist()):
            root = math.hypot(sigma, sigma_data)
            c_noise = torch.tensor([math.log(sigma) / 4], dtype=torch.float64)
            one = slice(i, i + 1)
            raw, feature = denoiser.model(noisy[one] / root, c_noise, condition[one].class_labels, "both")
            expected = (sigma_data / root) ** 2 * noisy[one] + sigma * sigma_data / root * raw
            torch.testing.assert_close(out.x0[one], expected, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(out.bottleneck[one], feature.float())
    torch.testing.assert_close(denoiser.denoising_weight(level), level**-2 + sigma_data**-2)
