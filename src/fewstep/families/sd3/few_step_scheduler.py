"""FlowMatchLCMScheduler with a generator's own steps, so that nobody types timesteps."""

from typing import Any

import diffusers
import torch

from fewstep.diffusion.schedules import FlowSchedule, StepSchedule
from fewstep.errors import UserError
from fewstep.families.few_steps import nearest_steps


def build_few_step_scheduler(denoiser: Any, steps: StepSchedule) -> Any:
    """FlowMatchLCMScheduler for steps that start at pure noise and are evenly spaced before the shift.

    It spaces n times evenly from 1 down to a smallest one m, shifts them by s', and stretches them so that the last is
    `shift_terminal`. With v the even times and u = 1 - b (1 - v), b = (1 - u_n) / (1 - m), the wanted shift_s(u) is such a
    stretched shift for s' - 1 = (s - 1) b / (1 + (s - 1)(1 - b)); m depends on s' a little, hence the iteration.
    `scale_factors` of 1 change nothing, but let the scheduler refuse any other number of steps.

    Raises:
        UserError: it cannot express these steps, or this diffusers does not have it.
    """
    schedule: FlowSchedule = denoiser.noise_schedule
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
            + nearest_steps(
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
