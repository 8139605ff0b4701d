"""A stock diffusers scheduler that runs a generator's own steps, so that nobody types timesteps.

LCMScheduler (and FlowMatchLCMScheduler for flow models) samples as we do: predict x0, add fresh noise down to the next
step, return the last x0. What is worked out here is the config under which its own spacing gives the generator's steps.
"""

from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, LCMScheduler

from fewstep.diffusion.schedules import DiscreteSchedule, FlowSchedule, StepSchedule
from fewstep.errors import UserError
from fewstep.families.diffusers_denoiser import DiffusersDenoiser

_BETAS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
)  # fmt: skip


def build_few_step_scheduler(base: DiffusersDenoiser, steps: StepSchedule) -> Any:
    """The scheduler whose `set_timesteps(len(steps))` gives exactly the generator's steps.

    Raises:
        UserError: the stock schedulers cannot express these steps.
    """
    schedule = base.noise_schedule
    if isinstance(schedule, FlowSchedule):
        return _flow_scheduler(schedule, steps)
    assert isinstance(schedule, DiscreteSchedule)
    return _discrete_scheduler(base, schedule, steps)


def _discrete_scheduler(base: DiffusersDenoiser, schedule: DiscreteSchedule, steps: StepSchedule) -> Any:
    """LCMScheduler takes n steps at k - 1, 2k - 1, ..., nk - 1 with k = num_train_timesteps // n.

    `original_inference_steps` is n itself: more steps are then an error of the scheduler's own, and fewer ones are
    a subset of the steps the generator was trained at. Where nk is not the whole grid, the grid ends there: the
    first nk betas, which leaves every alpha as it was.
    """
    n, k = len(steps), steps.indices[-1] + 1
    if k < 2 or list(steps.indices) != [number * k - 1 for number in range(n, 0, -1)]:
        raise UserError(
            f"the steps {list(steps.indices)} cannot travel in a diffusers scheduler: LCMScheduler runs n evenly spaced "
            "steps nk - 1, ..., 2k - 1, k - 1; export --as unet and give timesteps yourself, or train with such steps"
            + _nearest(
                steps, [[number * k - 1 for number in range(n, 0, -1)] for k in range(2, steps.num_levels // n + 1)]
            )
        )
    config: Any = base.scheduler_config
    ddim: Any = DDIMScheduler(**{name: config[name] for name in _BETAS if name in config})
    options = {name: ddim.config[name] for name in _BETAS}
    if steps.num_levels // n != k:
        options = {"num_train_timesteps": n * k, "trained_betas": ddim.betas[: n * k].tolist()}
    scheduler: Any = LCMScheduler(
        **options, original_inference_steps=n, prediction_type=base.prediction, clip_sample=False, steps_offset=1,
        timestep_scaling=1e4,  # the boundary scalings of consistency models: c_skip 0 and c_out 1 at every step
    )  # fmt: skip
    scheduler.set_timesteps(n)
    assert scheduler.timesteps.tolist() == list(steps.indices), scheduler.timesteps
    levels = torch.tensor(steps.indices)
    assert torch.equal(scheduler.alphas_cumprod[levels], ddim.alphas_cumprod[levels])
    return scheduler


def _flow_scheduler(schedule: FlowSchedule, steps: StepSchedule) -> Any:
    """FlowMatchLCMScheduler for steps that start at pure noise and are evenly spaced before the shift.

    It spaces n times evenly from 1 down to a smallest one m, shifts them by s', and stretches them so that the last is
    `shift_terminal`. With v the even times and u = 1 - b (1 - v), b = (1 - u_n) / (1 - m), the wanted shift_s(u) is such a
    stretched shift for s' - 1 = (s - 1) b / (1 + (s - 1)(1 - b)); m depends on s' a little, hence the iteration.
    `scale_factors` of 1 change nothing, but let the scheduler refuse any other number of steps.
    """
    kind: Any = getattr(diffusers, "FlowMatchLCMScheduler", None)
    if kind is None:
        raise UserError("exporting a Stable Diffusion 3 pipeline needs FlowMatchLCMScheduler: pip install -U diffusers")
    n, total, shift = len(steps), steps.num_levels, schedule.shift
    times = [(index + 1) / total for index in steps.indices]
    even = [1 - number * (1 - times[-1]) / max(1, n - 1) for number in range(n)]
    if times[0] != 1 or max(abs(a - b) for a, b in zip(times, even, strict=True)) > 1e-6:
        raise UserError(
            f"the steps {list(steps.indices)} cannot travel in a diffusers scheduler: FlowMatchLCMScheduler runs evenly "
            f"spaced steps that start at {total - 1}; export --as unet, or train with such steps"
            + _nearest(
                steps,
                [list(range(total - 1, total - 1 - n * k, -k)) for k in range(1, (total - 1) // max(1, n - 1) + 1)],
            )
        )
    if n == 1:
        scheduler = kind(num_train_timesteps=total, shift=shift)
    else:
        own_shift = shift
        for _ in range(50):
            smallest = own_shift / total / (1 + (own_shift - 1) / total)
            b = (1 - times[-1]) / (1 - smallest)
            own_shift = 1 + (shift - 1) * b / (1 + (shift - 1) * (1 - b))
        scheduler = kind(
            num_train_timesteps=total, shift=own_shift, shift_terminal=float(schedule.grid[steps.indices[-1]]),
            scale_factors=[1.0] * (n - 1), upscale_mode="nearest",
        )  # fmt: skip
    scheduler.set_timesteps(n)
    wanted = torch.tensor([float(schedule.grid[index]) for index in steps.indices])
    assert (scheduler.sigmas[:-1] - wanted).abs().max() < 1e-5, scheduler.sigmas
    return scheduler


def _nearest(steps: StepSchedule, possible: list[list[int]]) -> str:
    """The end of a refusal: which of the possible schedules, of as many steps, lies nearest; nothing where there is none."""
    near = min(
        possible, key=lambda other: sum(abs(a - b) for a, b in zip(other, steps.indices, strict=True)), default=None
    )
    return "" if near is None else f": the nearest are generator.step_indices={near}"
