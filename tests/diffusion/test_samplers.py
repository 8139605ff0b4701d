import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser, DenoiserOutput, Want
from fewstep.diffusion.per_sample import per_sample
from fewstep.diffusion.samplers import (
    generate,
    heun_evaluations,
    sample_ddim,
    sample_euler,
    sample_few_steps,
    sample_generator,
    sample_heun,
    trailing_indices,
)
from fewstep.diffusion.schedules import (
    DiscreteSchedule,
    FlowSchedule,
    KarrasSchedule,
    NoiseSchedule,
    StepSchedule,
)
from fewstep.families.prediction import Prediction, predicted_x0
from tests.conftest import tiny_denoiser

DATA_STD = 0.5
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


class GaussianDenoiser(Denoiser):
    """The exact denoiser of N(0, DATA_STD^2) data, x s_d^2 / (s_d^2 + sigma^2), counting its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.noise_schedule = KarrasSchedule()
        self.image_shape = (1, 2, 2)
        self.levels: list[Tensor] = []

    def forward(self, noisy: Tensor, level: Tensor, condition: Condition, want: Want = "x0") -> DenoiserOutput:
        assert len(noisy) == len(level) == len(condition)
        self.levels.append(level)
        shrink = DATA_STD**2 / (DATA_STD**2 + level.double() ** 2)
        return DenoiserOutput((shrink[:, None, None, None] * noisy.double()).to(noisy.dtype), None)


def spread(sigma: float) -> float:
    """Standard deviation of noised data."""
    return math.hypot(DATA_STD, sigma)


def some_noise(batch: int = 3) -> Tensor:
    return torch.randn(batch, 1, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_steps", [2, 5, 18])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_heun_evaluates_twice_a_step_but_once_at_the_end(num_steps: int, guidance_scale: float) -> None:
    denoiser, condition = GaussianDenoiser(), Condition(3)
    sample_heun(denoiser, some_noise(), condition, num_steps=num_steps, guidance_scale=guidance_scale)
    assert len(denoiser.levels) == heun_evaluations(num_steps) == 2 * num_steps - 1
    assert {len(level) for level in denoiser.levels} == {3 if guidance_scale == 1 else 6}


def test_eighteen_steps_are_thirty_five_evaluations_by_default() -> None:
    denoiser = GaussianDenoiser()
    sample_heun(denoiser, some_noise(), Condition(3), num_steps=18)
    assert len(denoiser.levels) == heun_evaluations(18) == 35


def test_heun_visits_the_published_levels_from_noisy_to_clean() -> None:
    denoiser = GaussianDenoiser()
    sample_heun(denoiser, some_noise(1), Condition(1), num_steps=5)
    low, high = SIGMA_MIN ** (1 / 7), SIGMA_MAX ** (1 / 7)
    sigmas = [(high + i / 4 * (low - high)) ** 7 for i in range(5)]
    expected = [sigmas[0]] + [sigma for sigma in sigmas[1:] for _ in range(2)]
    assert [level.item() for level in denoiser.levels] == pytest.approx(expected, rel=1e-6)


def test_heun_equals_the_published_algorithm_in_python_floats() -> None:
    low, high, last = SIGMA_MIN ** (1 / 7), SIGMA_MAX ** (1 / 7), 17
    sigmas = [(high + i / last * (low - high)) ** 7 for i in range(last + 1)] + [0.0]
    x = sigmas[0]  # the ODE is linear: the image is its noise times one number
    for now, after in itertools.pairwise(sigmas):
        slope = (x - x * (DATA_STD / spread(now)) ** 2) / now
        x_next = x + (after - now) * slope
        if after > 0:
            slope_next = (x_next - x_next * (DATA_STD / spread(after)) ** 2) / after
            x_next = x + (after - now) * (slope + slope_next) / 2
        x = x_next
    noise = some_noise()
    x0 = sample_heun(GaussianDenoiser(), noise, Condition(3), num_steps=18)
    torch.testing.assert_close(x0, noise * x, rtol=1e-5, atol=1e-6)


def test_heun_is_second_order() -> None:
    noise = some_noise().double()
    # the ODE's exact solution down to sigma_min, then the one Euler step to 0, which lands on the denoised image
    exact = noise * SIGMA_MAX * spread(SIGMA_MIN) / spread(SIGMA_MAX) * (DATA_STD / spread(SIGMA_MIN)) ** 2
    errors = []
    for intervals in (20, 40, 80):
        x0 = sample_heun(GaussianDenoiser(), noise, Condition(3), num_steps=intervals + 1)
        errors.append((x0.double() - exact).abs().max().item())
    rates = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert 1.8 < rates[0] < 2.3
    assert 1.9 < rates[1] < 2.15


def test_heun_reaches_the_data_distribution() -> None:
    noise = some_noise()
    exact = noise * SIGMA_MAX * DATA_STD / spread(SIGMA_MAX)
    for num_steps, bound in ((18, 0.06), (100, 2e-3)):
        x0 = sample_heun(GaussianDenoiser(), noise, Condition(3), num_steps=num_steps)
        assert ((x0 - exact).abs().max() / exact.abs().max()).item() < bound


def test_heun_follows_guidance() -> None:
    denoiser = tiny_denoiser()
    noise, condition = torch.randn(2, 1, 16, 16), Condition.from_labels(torch.tensor([0, 3]), 4)
    plain, guided, unguided = (
        sample_heun(denoiser, noise, given, num_steps=3, guidance_scale=scale)
        for given, scale in ((condition, 1.0), (condition, 4.0), (condition.unconditional(), 4.0))
    )
    assert (plain - guided).abs().max() > 1e-3
    # an unconditional condition has nothing to guide toward
    expected = sample_heun(denoiser, noise, condition.unconditional(), num_steps=3)
    torch.testing.assert_close(unguided, expected, rtol=1e-4, atol=1e-4)


def test_heun_does_not_depend_on_the_batch_and_leaves_its_input() -> None:
    denoiser, noise = tiny_denoiser(), torch.randn(4, 1, 16, 16)
    condition, before = Condition.from_labels(torch.arange(4), 4), noise.clone()
    whole = sample_heun(denoiser, noise, condition, num_steps=3)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    assert torch.equal(noise, before)
    parts = [sample_heun(denoiser, noise[i : i + 1], condition[i : i + 1], num_steps=3) for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-5)


def test_generate_is_one_differentiable_forward_from_pure_noise() -> None:
    denoiser, noise = tiny_denoiser().double(), torch.randn(2, 1, 16, 16, dtype=torch.float64)
    condition = Condition.from_one_hot(torch.eye(4).double()[:2])
    x0 = generate(denoiser, noise, condition, denoiser.noise_schedule.expanded(999, 2, noise.device))
    sigma = denoiser.noise_schedule.grid[999]
    torch.testing.assert_close(x0, denoiser.denoise(sigma * noise, sigma.expand(2), condition))
    x0.sum().backward()
    assert all(parameter.grad is not None for parameter in denoiser.parameters())


@pytest.mark.parametrize("index", [999, 399])
def test_generate_starts_at_its_own_level(index: int) -> None:
    denoiser, noise = GaussianDenoiser(), some_noise()
    x0 = generate(denoiser, noise, Condition(3), denoiser.noise_schedule.expanded(index, 3, noise.device))
    sigma = denoiser.noise_schedule.grid[index].item()
    torch.testing.assert_close(x0, noise * sigma * DATA_STD**2 / spread(sigma) ** 2)
    assert [level.tolist() for level in denoiser.levels] == [[sigma] * 3]


@pytest.mark.parametrize("indices", [(999,), (999, 499), (999, 749, 499, 249), (700, 30)])
def test_few_steps_equal_the_hand_unrolled_loop(indices: tuple[int, ...]) -> None:
    denoiser, noise = tiny_denoiser(), torch.randn(2, 1, 16, 16)
    condition = Condition.from_labels(torch.tensor([1, 2]), 4)
    fresh, asked = torch.randn(4, 2, 1, 16, 16), []

    def fresh_noise(number: int) -> Tensor:
        asked.append(number)
        return fresh[number]

    x0 = sample_few_steps(denoiser, noise, condition, StepSchedule(indices), fresh_noise)
    assert asked == list(range(1, len(indices)))  # fresh noise between steps only, another one each time
    assert not x0.requires_grad
    sigmas = denoiser.noise_schedule.grid[list(indices)]
    with torch.no_grad():
        expected = denoiser.denoise(sigmas[0] * noise, sigmas[0].repeat(2), condition)
        for number in range(1, len(indices)):
            noisy = expected + sigmas[number] * fresh[number]
            expected = denoiser.denoise(noisy, sigmas[number].repeat(2), condition)
    torch.testing.assert_close(x0, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_a_step_of_the_generator_is_one_evaluation(num_steps: int) -> None:
    denoiser, steps = GaussianDenoiser(), StepSchedule(tuple(range(999, -1, -1000 // num_steps)))
    sample_few_steps(denoiser, some_noise(), Condition(3), steps, lambda number: some_noise())
    assert len(denoiser.levels) == num_steps
    assert [level[0].item() for level in denoiser.levels] == [
        denoiser.noise_schedule.grid[index].item() for index in steps.indices
    ]


def test_a_single_heun_step_denoises_pure_noise() -> None:
    noise = some_noise()
    x0 = sample_heun(GaussianDenoiser(), noise, Condition(3), num_steps=1)
    torch.testing.assert_close(x0, noise * SIGMA_MAX * DATA_STD**2 / spread(SIGMA_MAX) ** 2)


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps"):
        sample_heun(GaussianDenoiser(), some_noise(), Condition(3), num_steps=0)


# --- DDIM

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ddim_scheduler(prediction_type: str = "epsilon") -> Any:
    """diffusers' own, eta 0, trailing, nothing clipped, its tables in float64."""
    scheduler: Any = DDIMScheduler(
        **BETAS, prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return scheduler


SCHEDULES: dict[str, NoiseSchedule] = {
    "discrete": DiscreteSchedule(ddim_scheduler().alphas_cumprod), "flow": FlowSchedule(3.0)
}  # fmt: skip


class GaussianVPDenoiser(Denoiser):
    """The exact denoiser of N(0, DATA_STD^2) data for any alpha and sigma."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.noise_schedule = schedule
        self.levels: list[Tensor] = []

    def forward(self, noisy: Tensor, level: Tensor, condition: Condition, want: Want = "x0") -> DenoiserOutput:
        self.levels.append(level)
        alpha, sigma = self.noise_schedule.alpha(level).double(), self.noise_schedule.sigma(level).double()
        gain = alpha * DATA_STD**2 / (alpha**2 * DATA_STD**2 + sigma**2)
        return DenoiserOutput((per_sample(gain, noisy) * noisy.double()).to(noisy.dtype), None)


class FixedNetwork(Denoiser):
    """A smooth made-up network of any parameterisation, that remembers what it was fed and what it said."""

    def __init__(self, schedule: NoiseSchedule, prediction: Prediction) -> None:
        super().__init__()
        self.noise_schedule, self.prediction = schedule, prediction
        self.fed: list[Tensor] = []

    def raw(self, noisy: Tensor, level: Tensor) -> Tensor:
        return torch.tanh(noisy.flip(-1) + 0.3 * noisy**2 - per_sample(level.double() / 500, noisy))

    def forward(self, noisy: Tensor, level: Tensor, condition: Condition, want: Want = "x0") -> DenoiserOutput:
        self.fed.append(noisy)
        schedule = self.noise_schedule
        alpha, sigma = (per_sample(part(level).double(), noisy) for part in (schedule.alpha, schedule.sigma))
        x0 = predicted_x0(self.prediction, self.raw(noisy.double(), level), noisy.double(), alpha, sigma)
        return DenoiserOutput(x0.to(noisy.dtype), None)


@pytest.mark.slow
def test_trailing_indices_are_those_of_diffusers() -> None:
    """For every number of steps; where T - k T/n is exactly a half, diffusers' floating point rounds either way."""
    scheduler, compared = ddim_scheduler(), 0
    for num_steps in range(1, 1001):
        scheduler.set_timesteps(num_steps)
        found, theirs = trailing_indices(num_steps, 1000), scheduler.timesteps.tolist()
        assert len(found) == num_steps
        assert found[0] == 999
        assert found[-1] >= 0
        assert all(a > b for a, b in itertools.pairwise(found)), num_steps
        for number, (ours, expected) in enumerate(zip(found, theirs, strict=False)):
            is_half = Fraction(2000 * number, num_steps).denominator == 1 and (2000 * number // num_steps) % 2
            assert abs(ours - expected) <= bool(is_half), (num_steps, number)
        compared += len(theirs) == num_steps  # their range is one too long for some
    assert compared > 900
    assert trailing_indices(4, 1000) == [999, 749, 499, 249]


@pytest.mark.parametrize("num_steps", [0, -1, 11])
def test_impossible_numbers_of_steps_are_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"num_steps={num_steps} must lie between 1 and the 10 levels of the model"):
        trailing_indices(num_steps, 10)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_ddim_converges_to_the_exact_solution(name: str) -> None:
    """For Gaussian data x_t / sqrt(alpha^2 s^2 + sigma^2) is constant along the ODE; the error falls like 1 / n."""
    schedule, noise = SCHEDULES[name], some_noise()

    def spread_at(index: int) -> float:
        level = schedule.grid[index : index + 1]
        return math.hypot(schedule.alpha(level).item() * DATA_STD, schedule.sigma(level).item())

    errors = []
    for num_steps in (20, 100, 500):
        x0 = sample_ddim(GaussianVPDenoiser(schedule), noise, Condition(3), num_steps=num_steps)
        exact = noise * DATA_STD / spread_at(999)
        errors.append(((x0 - exact).norm() / exact.norm()).item())
    assert errors[2] < 0.02
    assert 3 < errors[0] / errors[1] < 7
    assert 3 < errors[1] / errors[2] < 7


@pytest.mark.parametrize("num_steps", [1, 2, 4, 10, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_is_diffusers_step_by_step(prediction: Prediction, num_steps: int) -> None:
    """Numbers of steps that divide 1000: elsewhere diffusers steps to levels it does not evaluate at."""
    denoiser, noise = FixedNetwork(SCHEDULES["discrete"], prediction), some_noise()
    x0 = sample_ddim(denoiser, noise, Condition(3), num_steps=num_steps)
    scheduler = ddim_scheduler(prediction)
    scheduler.set_timesteps(num_steps)
    x = noise.double()
    assert len(denoiser.fed) == num_steps
    for fed, timestep in zip(denoiser.fed, scheduler.timesteps.tolist(), strict=True):
        assert ((fed - x).norm() / x.norm()).item() < 1e-5
        x = scheduler.step(denoiser.raw(x, torch.full((3,), timestep)), timestep, x, eta=0.0).prev_sample
    assert ((x0 - x).norm() / x.norm()).item() < 1e-5
    assert x0.dtype == torch.float32


@pytest.mark.parametrize("num_steps", [1, 4, 7, 28])
def test_flow_sampling_is_eulers_method(num_steps: int) -> None:
    """x += (t' - t) v by hand, and by diffusers' scheduler given the same times."""
    schedule = SCHEDULES["flow"]
    denoiser, noise = FixedNetwork(schedule, "flow"), some_noise()
    x0 = sample_ddim(denoiser, noise, Condition(3), num_steps=num_steps)
    unshifted = [1 - number / num_steps for number in range(num_steps)]
    indices = [round(1000 * u) - 1 for u in unshifted]
    times = [*(3 * (i + 1) / 1000 / (1 + 2 * (i + 1) / 1000) for i in indices), 0.0]
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[(i + 1) / 1000 for i in indices])
    x, theirs = noise.double(), noise.double()
    for number, (now, after) in enumerate(itertools.pairwise(times)):
        assert ((denoiser.fed[number] - x).norm() / x.norm()).item() < 1e-5
        x = x + (after - now) * denoiser.raw(x, torch.full((3,), now))
        velocity = denoiser.raw(theirs, torch.full((3,), now))
        theirs = scheduler.step(velocity, scheduler.timesteps[number], theirs).prev_sample
    assert ((x0 - x).norm() / x.norm()).item() < 1e-5
    assert ((x0 - theirs).norm() / theirs.norm()).item() < 1e-5


def test_one_ddim_step_denoises_pure_noise() -> None:
    for schedule in SCHEDULES.values():
        denoiser, noise = GaussianVPDenoiser(schedule), some_noise()
        x0 = sample_ddim(denoiser, noise, Condition(3), num_steps=1)
        assert torch.equal(x0, denoiser.denoise(noise, schedule.expanded(999, 3, noise.device), Condition(3)))


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 2), (2, 3, 2, 2)], ids=["2 axes", "3 axes", "4 axes", "5 axes"])
@pytest.mark.parametrize("schedule", [KarrasSchedule(), FlowSchedule(3.0)], ids=["EDM", "flow"])
def test_any_number_of_axes(schedule: NoiseSchedule, shape: tuple[int, ...]) -> None:
    """Levels that differ by sample, noised and denoised: as each sample alone; the samplers keep the shape."""
    denoiser, noise = GaussianVPDenoiser(schedule), torch.randn(3, *shape)
    denoiser.image_shape = shape
    denoiser.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    level = schedule.at(torch.tensor([10, 500, 990]))
    noisy = denoiser.add_noise(noise.flip(0), noise, level)
    x0 = denoiser.denoise(noisy, level, Condition(3))
    for row in range(3):
        one = slice(row, row + 1)
        torch.testing.assert_close(noisy[one], denoiser.add_noise(noise.flip(0)[one], noise[one], level[one]))
        torch.testing.assert_close(x0[one], denoiser.denoise(noisy[one], level[one], Condition(1)))
    sample = sample_heun if isinstance(schedule, KarrasSchedule) else sample_ddim
    assert sample(denoiser, noise, Condition(3), num_steps=2).shape == noise.shape
    steps = StepSchedule((999, 499))
    made = sample_generator(denoiser, steps, Condition(3), seed=0)
    torch.testing.assert_close(made[1:2], sample_generator(denoiser, steps, Condition(1), seed=0, first=1))


# --- Euler, of noise-image pairs


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' scheduler under numpy 2
@pytest.mark.parametrize("num_steps", [1, 4, 50])
def test_euler_is_that_of_diffusers(num_steps: int) -> None:
    """Trailing spacing, and the first input as EulerDiscreteScheduler scales it: 0.9977 times the noise."""
    scheduler: Any = EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    denoiser = GaussianVPDenoiser(SCHEDULES["discrete"])
    noise = some_noise().double()
    found = sample_euler(denoiser, noise.float(), Condition(3), num_steps=num_steps)
    x, seen = noise * scheduler.init_noise_sigma, list[Tensor]()
    for step, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1].double(), strict=True):
        scaled = x / (sigma**2 + 1).sqrt()  # its scale_model_input
        seen.append(scaled)
        level = step.long().expand(3)
        alpha = denoiser.noise_schedule.alpha(level).double()[0]
        x0 = denoiser.denoise(scaled, level, Condition(3))
        after = scheduler.sigmas[len(seen)].double()
        x = x + (after - sigma) * (scaled - alpha * x0) / (1 - alpha**2).sqrt()
    torch.testing.assert_close(found.double(), x, rtol=1e-3, atol=1e-4)
    assert float((seen[0] / noise).mean()) == pytest.approx(0.9977, abs=1e-4)
    if num_steps == 1:  # the scale is not lost in the tolerance
        plain = sample_ddim(denoiser, noise.float(), Condition(3), num_steps=1)
        assert float((found / plain).mean()) == pytest.approx(0.9977, abs=1e-4)


def test_euler_of_flow_models_starts_from_the_noise() -> None:
    denoiser, noise = GaussianVPDenoiser(SCHEDULES["flow"]), some_noise()
    assert torch.equal(
        sample_euler(denoiser, noise, Condition(3), num_steps=4),
        sample_ddim(denoiser, noise, Condition(3), num_steps=4),
    )
