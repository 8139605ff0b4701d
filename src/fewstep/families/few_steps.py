"""Few-step schedules in stock schedulers: the one of flow models, and what every family says where none can carry them."""

from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.schedules import FlowSchedule, StepSchedule
from fewstep.errors import UserError

_EXACT = 1e-5  # of a noise level: float32 rounds a scheduler's arithmetic by less


def nearest_steps(steps: StepSchedule, possible: list[list[int]]) -> str:
    """The end of a refusal: which of the possible schedules, of as many steps, lies nearest; nothing where there is none."""
    near = min(
        possible, key=lambda other: sum(abs(a - b) for a, b in zip(other, steps.indices, strict=True)), default=None
    )
    return "" if near is None else f": the nearest are generator.step_indices={near}"


def build_flow_scheduler(denoiser: Denoiser, steps: StepSchedule, given: list[float] | None) -> Any:
    """FlowMatchLCMScheduler with a generator's own noise levels, so that nobody types timesteps.

    It samples as we do: predict x0, add fresh noise down to the next level, return the last x0. Of evenly spaced
    u_k = 1 - k d it makes shift_s(u_k), stretched so that the last is `shift_terminal`. With w_k = 1 - sigma_k that is
    k / w_k = A - B k, A = s / (C d), B = (s - 1) / C, C the stretch: s = A d / (A d - B). So two and three steps that
    start at pure noise always travel, more where they lie on such a curve, as the trailing steps of any shift do.
    `scale_factors` of 1 change nothing, but let the scheduler refuse any other number of steps (of a one-step generator
    it cannot).

    Args:
        steps: of the generator.
        given: the u_k that the family's pipeline gives to the scheduler; None: the scheduler spaces them itself.

    Raises:
        UserError: it cannot express these steps, or this diffusers does not have it.
    """
    import diffusers

    kind: Any = getattr(diffusers, "FlowMatchLCMScheduler", None)
    if kind is None:
        raise UserError("exporting a pipeline of a flow model needs FlowMatchLCMScheduler: pip install -U diffusers")
    schedule, total = denoiser.noise_schedule, steps.num_levels
    assert isinstance(schedule, FlowSchedule)
    wanted = steps.levels(schedule, torch.device("cpu"))
    if len(steps) == 1:
        scheduler = kind(num_train_timesteps=total, shift=schedule.shift)
    else:
        shift = _fitted_shift(wanted.double(), given, total)
        scheduler = kind(
            num_train_timesteps=total, shift=shift, shift_terminal=float(wanted[-1]),
            scale_factors=[1.0] * (len(steps) - 1), upscale_mode="nearest",
        )  # fmt: skip
    scheduler.set_timesteps(len(steps)) if given is None else scheduler.set_timesteps(sigmas=given)
    if not (scheduler.sigmas[:-1] - wanted).abs().max() < _EXACT:
        raise UserError(
            f"the steps {list(steps.indices)} cannot travel in a diffusers scheduler: FlowMatchLCMScheduler runs evenly "
            f"spaced steps that start at {total - 1}; export --as unet, or train with such steps"
            + nearest_steps(steps, _travelling(len(steps), total))
        )
    return scheduler


def _fitted_shift(wanted: Tensor, given: list[float] | None, num_levels: int) -> float:
    """The scheduler's own shift for levels (n,) that start at pure noise; 1 where the levels lie on no such curve."""
    n = len(wanted)
    if n == 2 or wanted[0] != 1:  # two steps: any shift, `shift_terminal` does the rest
        return 1.0
    slant = (1 / (1 - wanted[1]) - (n - 1) / (1 - wanted[-1])) / (n - 2)  # B
    start, shift = 1 / (1 - wanted[1]) + slant, 1.0  # A
    for _ in range(50):
        smallest = shift / num_levels / (1 + (shift - 1) / num_levels)
        d = 1 - given[1] if given is not None else (1 - smallest) / (n - 1)
        shift = float(start * d / (start * d - slant))
        if not 0 < shift < 1e6:
            return 1.0
    return shift


def _travelling(n: int, total: int) -> list[list[int]]:
    """Evenly spaced grid indices of n steps that start at pure noise: they always travel."""
    spacings = range(1, (total - 1) // max(1, n - 1) + 1)
    return [list(range(total - 1, total - 1 - n * k, -k)) for k in spacings]
