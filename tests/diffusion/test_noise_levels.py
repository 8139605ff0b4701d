import dataclasses

import numpy as np
import pytest
import torch

from fewstep.diffusion.noise_levels import KarrasSchedule, karras_sigmas, per_sample

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
