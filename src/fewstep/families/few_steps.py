"""What every family says where no stock scheduler can carry a generator's steps."""

from fewstep.diffusion.schedules import StepSchedule


def nearest_steps(steps: StepSchedule, possible: list[list[int]]) -> str:
    """The end of a refusal: which of the possible schedules, of as many steps, lies nearest; nothing where there is none."""
    near = min(
        possible, key=lambda other: sum(abs(a - b) for a, b in zip(other, steps.indices, strict=True)), default=None
    )
    return "" if near is None else f": the nearest are generator.step_indices={near}"
