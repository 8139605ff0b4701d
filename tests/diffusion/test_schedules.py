import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from fewstep.diffusion.per_sample import per_sample
from fewstep.diffusion.schedules import (
    DiscreteSchedule,
    FlowSchedule,
    KarrasSchedule,
    NoiseSchedule,
    karras_sigmas,
)

EDM = KarrasSchedule()


def published_sigma(index: int) -> float:
    """METHOD section 5: (0.002^(1/7) + i/999 (80^(1/7) - 0.002^(1/7)))^7, in Python floats."""
    return (0.002 ** (1 / 7) + index / 999 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7


@pytest.mark.parametrize("index", [0, 1, 20, 249, 499, 500, 749, 980, 998, 999])
def test_grid_follows_the_published_formula(index: int) -> None:
    assert karras_sigmas(1000, 0.002, 80, 7)[index].item() == pytest.approx(published_sigma(index), rel=1e-13)
    assert EDM.grid[index].item() == pytest.approx(published_sigma(index), rel=1e-7)


def test_grid_runs_from_small_to_large_in_a_thousand_levels() -> None:
    assert EDM.grid.shape == (EDM.num_levels,) == (1000,)
    assert EDM.grid.dtype == torch.float32
    assert (EDM.grid.diff() > 0).all()
    assert EDM.grid[0].item() == pytest.approx(0.002, rel=1e-6)
    assert EDM.grid[-1].item() == pytest.approx(80, rel=1e-6)


def test_other_numbers_give_another_grid() -> None:
    grid = KarrasSchedule(sigma_min=0.01, sigma_max=10, rho=2, num_levels=3).grid
    torch.testing.assert_close(grid, torch.tensor([0.01, ((0.1 + 10**0.5) / 2) ** 2, 10]))


def test_at_reads_the_grid_in_any_order() -> None:
    index = torch.tensor([999, 0, 20, 20])
    assert EDM.at(index).tolist() == [EDM.grid[i].item() for i in (999, 0, 20, 20)]


def test_level_is_sigma_and_alpha_is_one() -> None:
    level = torch.tensor([0.002, 0.5, 80])
    assert EDM.alpha(level).tolist() == [1, 1, 1]
    assert torch.equal(EDM.sigma(level), level)


def test_add_noise_scales_every_sample_by_its_own_level() -> None:
    random = np.random.default_rng(0)
    x0, noise = random.normal(size=(2, 3, 2, 4, 5))
    level = np.array([0.002, 1.5, 80])
    noisy = EDM.add_noise(torch.tensor(x0), torch.tensor(noise), torch.tensor(level))
    for i in range(3):
        np.testing.assert_allclose(noisy[i], x0[i] + level[i] * noise[i], rtol=1e-15)


def test_initial_is_sigma_times_noise() -> None:
    noise, level = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.tensor([80.0, 3.0]).double()
    initial = EDM.initial(noise, level)
    torch.testing.assert_close(initial[0], 80 * noise[0])
    torch.testing.assert_close(initial[1], 3 * noise[1])


@pytest.mark.parametrize("ndim", [1, 2, 4])
def test_per_sample_broadcasts_over_trailing_dimensions(ndim: int) -> None:
    like = torch.ones(3, *range(2, ndim + 1))
    values = torch.tensor([1.0, 2.0, 3.0])
    assert per_sample(values, like).ndim == ndim
    product = per_sample(values, like) * like
    assert product.shape == like.shape
    assert [product[i].unique().tolist() for i in range(3)] == [[1], [2], [3]]


def test_schedule_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EDM.sigma_max = 1.0  # type: ignore[misc]


# --- Discrete (variance-preserving) and flow schedules

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SOME = torch.tensor([0, 1, 20, 249, 499, 749, 980, 998, 999])


def stable_diffusion(**options: Any) -> DiscreteSchedule:
    scheduler: Any = DDPMScheduler(**BETAS, **options)
    return DiscreteSchedule(scheduler.alphas_cumprod)


def test_discrete_levels_are_the_timesteps() -> None:
    schedule = stable_diffusion()
    assert schedule.num_levels == 1000
    assert torch.equal(schedule.grid, torch.arange(1000))
    assert not schedule.grid.is_floating_point()
    assert torch.equal(schedule.at(SOME), SOME)
    assert schedule.expanded(749, 3, torch.device("cpu")).tolist() == [749] * 3


def test_discrete_alpha_and_sigma_follow_the_betas() -> None:
    """In Python floats; diffusers multiplies a thousand float32 factors, hence the tolerance."""
    schedule, product = stable_diffusion(), 1.0
    low, high = 0.00085**0.5, 0.012**0.5
    alphas, sigmas = schedule.alpha(schedule.grid).tolist(), schedule.sigma(schedule.grid).tolist()
    for timestep in range(1000):
        product *= 1 - (low + timestep / 999 * (high - low)) ** 2
        assert alphas[timestep] == pytest.approx(product**0.5, rel=1e-4)
        assert sigmas[timestep] == pytest.approx((1 - product) ** 0.5, rel=1e-4)


def test_discrete_tables_are_those_of_diffusers_schedulers() -> None:
    schedule, ddpm, euler = stable_diffusion(), DDPMScheduler(**BETAS), EulerDiscreteScheduler(**BETAS)
    alpha, sigma = schedule.alpha64(schedule.grid), schedule.sigma64(schedule.grid)
    assert alpha.dtype == sigma.dtype == torch.float64
    torch.testing.assert_close(alpha**2, ddpm.alphas_cumprod.double(), rtol=1e-14, atol=0)  # type: ignore[attr-defined]
    torch.testing.assert_close(alpha**2, euler.alphas_cumprod.double(), rtol=1e-14, atol=0)  # type: ignore[attr-defined]
    # Euler's own sigmas are those of x / alpha, noisiest first, with a last 0
    torch.testing.assert_close((sigma / alpha).flip(0).float(), euler.sigmas[:-1], rtol=1e-5, atol=0)


def test_discrete_noise_is_added_as_diffusers_adds_it() -> None:
    schedule, scheduler = stable_diffusion(), DDPMScheduler(**BETAS)
    x0, noise = torch.randn(2, len(SOME), 4, 3, 3)
    expected = scheduler.add_noise(x0, noise, SOME)  # type: ignore[arg-type]
    torch.testing.assert_close(schedule.add_noise(x0, noise, SOME), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_variance_is_preserved(zero_terminal: bool) -> None:
    schedule = stable_diffusion(rescale_betas_zero_snr=zero_terminal)
    for kind in ("", "64"):
        alpha, sigma = (getattr(schedule, name + kind)(schedule.grid) for name in ("alpha", "sigma"))
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
        assert (alpha.diff() < 0).all()
        assert (sigma.diff() > 0).all()
    assert schedule.alpha(SOME).dtype == schedule.sigma(SOME).dtype == torch.float32


def test_zero_terminal_signal() -> None:
    """Lin et al. 2023, algorithm 1: the last alpha is 0, the first is kept, the square roots are shifted and scaled."""
    plain, schedule = stable_diffusion(), stable_diffusion(rescale_betas_zero_snr=True)
    assert plain.has_signal_everywhere
    assert not schedule.has_signal_everywhere
    last = torch.tensor([999])
    assert schedule.alpha64(last).item() == schedule.alpha(last).item() == 0
    assert schedule.sigma64(last).item() == schedule.sigma(last).item() == 1
    old = plain.alpha64(plain.grid)
    expected = (old - old[-1]) * old[0] / (old[0] - old[-1])
    torch.testing.assert_close(schedule.alpha64(schedule.grid), expected, rtol=2e-4, atol=1e-6)
    x0, noise = torch.randn(2, 1, 4, 3, 3)
    assert torch.equal(schedule.add_noise(x0, noise, last), noise)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_flow_grid_is_that_of_diffusers_training_sigmas(shift: float) -> None:
    """diffusers lists them from noise to image."""
    schedule, scheduler = FlowSchedule(shift), FlowMatchEulerDiscreteScheduler(shift=shift)
    torch.testing.assert_close(schedule.grid.flip(0), scheduler.sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.grid.flip(0) * 1000, scheduler.timesteps, rtol=1e-6, atol=0)


def test_shift_3_on_the_four_steps() -> None:
    """t = 3 u / (1 + 2 u) at u = 1, 3/4, 1/2, 1/4."""
    levels = FlowSchedule(3.0).at(torch.tensor([999, 749, 499, 249]))
    torch.testing.assert_close(levels, torch.tensor([1.0, 0.9, 0.75, 0.5]))
    torch.testing.assert_close(FlowSchedule().at(torch.tensor([999, 749, 0])), torch.tensor([1.0, 0.75, 0.001]))


@pytest.mark.parametrize("num_levels", [1000, 28])
def test_flow_grid_rises_to_pure_noise(num_levels: int) -> None:
    schedule = FlowSchedule(3.0, num_levels)
    assert schedule.grid.shape == (num_levels,)
    assert schedule.grid.dtype == torch.float32
    assert (schedule.grid.diff() > 0).all()
    assert schedule.grid[0] > 0
    assert schedule.grid[-1] == 1


def test_flow_paths_are_straight() -> None:
    schedule, level = FlowSchedule(3.0), torch.tensor([0.0, 0.25, 1.0])
    assert torch.equal(schedule.alpha(level) + schedule.sigma(level), torch.ones(3))
    x0, noise = torch.randn(2, 3, 4, 3, 3)
    noisy = schedule.add_noise(x0, noise, level)
    assert torch.equal(noisy[0], x0[0])
    torch.testing.assert_close(noisy[1], 0.75 * x0[1] + 0.25 * noise[1])
    assert torch.equal(noisy[2], noise[2])


def test_flow_noise_is_added_as_diffusers_adds_it() -> None:
    schedule, scheduler = FlowSchedule(3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    index = torch.tensor([0, 500, 999])
    x0, noise = torch.randn(2, 3, 4, 3, 3)
    expected = scheduler.scale_noise(x0, scheduler.timesteps.flip(0)[index], noise)  # type: ignore[arg-type]
    torch.testing.assert_close(schedule.add_noise(x0, noise, schedule.at(index)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", [stable_diffusion(), FlowSchedule(3.0)], ids=["discrete", "flow"])
def test_pure_noise_enters_as_it_is(schedule: NoiseSchedule) -> None:
    noise = torch.randn(2, 4, 3, 3)
    for index in (399, 999):
        assert torch.equal(schedule.initial(noise, schedule.expanded(index, 2, torch.device("cpu"))), noise)
