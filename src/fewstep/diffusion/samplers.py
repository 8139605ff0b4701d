"""Samplers over the Denoiser contract: the teacher's deterministic ODEs (Heun, DDIM) and the generator's few steps."""

import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser, guided_denoise
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.per_sample import per_sample
from fewstep.diffusion.precision import wide
from fewstep.diffusion.schedules import StepSchedule, karras_sigmas
from fewstep.errors import UserError

Seed: TypeAlias = int | tuple[int, ...]  # one for all images, or one an image


def heun_evaluations(num_steps: int) -> int:
    """Network evaluations of `sample_heun`: two a step, the last step has one."""
    return 2 * num_steps - 1


@torch.no_grad()
def sample_heun(
    denoiser: Denoiser, noise: Tensor, condition: Condition, *, num_steps: int,
    guidance_scale: float = 1.0, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0,
) -> Tensor:  # fmt: skip
    """Deterministic second-order sampling of a variance-exploding model.

    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1 (no churn). The state is integrated in float64 where the device has it.

    Args:
        denoiser: an EDM model (alpha = 1).
        noise: unit Gaussian, (B, ...).
        condition: B conditions.
        num_steps: n steps are 2n - 1 evaluations.

    Returns:
        x0, (B, ...), float32, not clamped.

    Raises:
        ValueError: num_steps is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: the sampler needs at least 1 step")
    sigmas = [*karras_sigmas(num_steps, sigma_min, sigma_max, rho).flip(0).tolist(), 0.0]
    x = wide(noise) * sigmas[0]

    def slope(x: Tensor, sigma: float) -> Tensor:
        level = torch.full((len(x),), sigma, device=x.device)
        x0 = guided_denoise(denoiser, x.float(), level, condition, guidance_scale)
        return (x - wide(x0)) / sigma

    for now, after in itertools.pairwise(sigmas):
        first = slope(x, now)
        euler = x + (after - now) * first
        if after == 0:
            return euler.float()
        x = x + (after - now) * (first + slope(euler, after)) / 2
    raise AssertionError("the last sigma is 0")


def trailing_indices(num_steps: int, num_levels: int) -> list[int]:
    """Grid indices of `num_steps` sampling steps that end at the noisiest level: T - 1, T - 1 - T/n, ...

    Source: Lin et al. 2023 (arXiv:2305.08891), table 2, "trailing".

    Raises:
        ValueError: more steps than levels, or none.
    """
    if not 1 <= num_steps <= num_levels:
        raise ValueError(f"num_steps={num_steps} must lie between 1 and the {num_levels} levels of the model")
    return [round(num_levels - number * num_levels / num_steps) - 1 for number in range(num_steps)]


@torch.no_grad()
def sample_ddim(
    denoiser: Denoiser, noise: Tensor, condition: Condition, *, num_steps: int, guidance_scale: float = 1.0
) -> Tensor:
    """Deterministic first-order sampling in any schedule's own alpha and sigma, trailing spacing; one evaluation a step.

    For flow models this is Euler's method. The state is integrated in float64 where the device has it.
    Source: Song et al. 2021 (arXiv:2010.02502), eq. 12 with eta = 0.

    Args:
        denoiser: a model whose noisiest level is (nearly) pure noise.
        noise: unit Gaussian, (B, ...).
        condition: B conditions.
        num_steps: network evaluations (guidance doubles each one's batch).

    Returns:
        x0, (B, ...), float32, not clamped.

    Raises:
        ValueError: num_steps is below 1 or above the number of levels.
    """
    schedule = denoiser.noise_schedule
    indices = trailing_indices(num_steps, schedule.num_levels)
    levels = schedule.at(torch.tensor(indices, device=noise.device))
    return sample_levels(denoiser, noise, condition, levels, guidance_scale=guidance_scale)


@torch.no_grad()
def sample_levels(
    denoiser: Denoiser, noise: Tensor, condition: Condition, levels: Tensor, *, guidance_scale: float = 1.0
) -> Tensor:
    """Deterministic first-order sampling through given noise levels; the last x0 is the image.

    Args:
        denoiser: a model whose first level here is (nearly) pure noise.
        noise: unit Gaussian, (B, ...).
        condition: B conditions.
        levels: the schedule's own noise coordinates in falling noise, (n,).

    Returns:
        x0, (B, ...), float32, not clamped.
    """
    schedule, size = denoiser.noise_schedule, len(noise)
    x = wide(schedule.initial(noise, levels[0].expand(size)))
    for number in range(len(levels)):
        level = levels[number].expand(size)
        x0 = wide(guided_denoise(denoiser, x.float(), level, condition, guidance_scale))
        if number == len(levels) - 1:
            return x0.float()
        alpha, sigma = (per_sample(wide(part(level)), x) for part in (schedule.alpha, schedule.sigma))
        after = levels[number + 1].expand(size)
        estimated_noise = (x - alpha * x0) / sigma
        x = (
            per_sample(wide(schedule.alpha(after)), x) * x0
            + per_sample(wide(schedule.sigma(after)), x) * estimated_noise
        )
    raise AssertionError("the last step returns")


def sample_euler(
    denoiser: Denoiser, noise: Tensor, condition: Condition, *, num_steps: int, guidance_scale: float = 1.0
) -> Tensor:
    """`sample_ddim` from sigma(noisiest level) times the noise, as diffusers' EulerDiscreteScheduler with trailing spacing scales it.

    0.9977 times the noise for Stable Diffusion and SDXL, the noise itself for flow models; the steps are the same ones.
    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1 without correction, in the model's own scaling.
    """
    schedule = denoiser.noise_schedule
    first = schedule.expanded(schedule.num_levels - 1, len(noise), noise.device)
    started = per_sample(schedule.sigma(first), noise) * noise
    return sample_ddim(denoiser, started, condition, num_steps=num_steps, guidance_scale=guidance_scale)


def generate(denoiser: Denoiser, noise: Tensor, condition: Condition, level: Tensor) -> Tensor:
    """One forward of a generator from pure noise at a level (B,); differentiable. Returns x0 (B, ...)."""
    return denoiser.denoise(denoiser.noise_schedule.initial(noise, level), level, condition)


@torch.no_grad()
def sample_few_steps(
    denoiser: Denoiser, noise: Tensor, condition: Condition, steps: StepSchedule,
    fresh_noise: Callable[[int], Tensor],
) -> Tensor:  # fmt: skip
    """Predict x0, add fresh noise down to the next step's level, repeat; the last x0 is the image.

    Source: DMD2 (arXiv:2405.14867), section 4.4.

    Args:
        denoiser: the generator.
        noise: unit Gaussian for the first step, (B, ...).
        condition: B conditions.
        steps: of the generator, noisiest first.
        fresh_noise: number of the step (1, 2, ...) -> unit Gaussian (B, ...) that enters it.

    Returns:
        x0, (B, ...), float32, not clamped.
    """
    schedule = denoiser.noise_schedule
    x0 = generate(denoiser, noise, condition, steps.level(schedule, 0, len(noise), noise.device))
    for number in range(1, len(steps)):
        level = steps.level(schedule, number, len(noise), noise.device)
        x0 = denoiser.denoise(denoiser.add_noise(x0, fresh_noise(number), level), level, condition)
    return x0


def sample_generator(
    denoiser: Denoiser, steps: StepSchedule, condition: Condition, *, seed: Seed, first: int = 0,
    shape: tuple[int, ...] | None = None,
) -> Tensor:  # fmt: skip
    """x0 of B images from a generator network, (B, ...), not clamped; `seed`, `first` and `shape` as `sample_noise` has them."""
    size, device = len(condition), next(denoiser.parameters()).device

    def fresh_noise(number: int) -> Tensor:
        return sample_noise(denoiser, seed, first, size, device, step=number, shape=shape)

    return sample_few_steps(denoiser, fresh_noise(0), condition, steps, fresh_noise)


def sample_noise(
    denoiser: Denoiser, seed: Seed, first: int, size: int, device: torch.device, step: int = 0,
    shape: tuple[int, ...] | None = None,
) -> Tensor:  # fmt: skip
    """Unit Gaussian (size, ...) that images start from (or meet at a later step).

    Args:
        seed: of images first..first + size - 1; or one seed an image, then each is image `first` of its own seed.
        shape: of one x0 where it is not the model's own.
    """
    if isinstance(seed, int):
        draws = Draws.of_batch(seed, step, size, device, first)
    else:
        draws = Draws(seed, step, torch.full((size,), first, dtype=torch.int64, device=device))
    return draws.normal("sample_noise", shape or denoiser.image_shape)


def check_seeds(seed: Seed, num_images: int) -> None:
    """Raise UserError for seeds that are none, and where a list of them does not have one per image."""
    for one in seed if isinstance(seed, Sequence) else (seed,):
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < 2**64:
            raise UserError(f"seed={one}: a seed is a whole number from 0 to 2^64 - 1")
    if isinstance(seed, Sequence) and len(seed) != num_images:
        raise UserError(f"{len(seed)} seeds for {num_images} images: give one seed, or one per image")


def batch_of_images(seed: Seed, first: int, start: int, size: int) -> tuple[Seed, int]:
    """`seed` and `first` of images start..start + size - 1 of a longer list."""
    if isinstance(seed, int):
        return seed, first + start
    return seed[start : start + size], first
