"""How the scheduler of a flow model shifts its noise levels: by a constant, by the picture's size, by the number of steps."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fewstep.diffusion.schedules import FlowSchedule

Mu = Callable[[int, int], float]  # (image tokens, number of steps) -> mu


@dataclass(frozen=True)
class FlowShift:
    """The noise levels at which a model's own pipeline samples, as FlowMatchEulerDiscreteScheduler works them out.

    n steps start from u = 1, 1 - 1/n, ..., 1/n, which the pipelines of these models give to their scheduler; it makes
    sigma = s u / (1 + (s - 1) u) of them (Esser et al. 2024, arXiv:2403.03206, eq. 23) and stretches the result so that
    it ends at `terminal`.

    Attributes:
        shift: s, where it is the same for all pictures.
        mu: where it is not: s = exp(mu), or mu itself; None: `shift` holds.
        is_exponential: which of the two.
        terminal: last level of any number of steps; 0: it is not stretched.
        num_levels: of the training grid.
        max_tokens: most image tokens that mu is known for; 0: there is no limit.
    """

    shift: float = 1.0
    mu: Mu | None = None
    is_exponential: bool = True
    terminal: float = 0.0
    num_levels: int = 1000
    max_tokens: int = 0

    def shift_of(self, num_tokens: int, num_steps: int) -> float:
        """s for a picture of this many tokens in this many steps."""
        if self.mu is None:
            return self.shift
        mu = self.mu(num_tokens, num_steps)
        return math.exp(mu) if self.is_exponential else mu

    def sigmas(self, num_tokens: int, num_steps: int) -> list[float]:
        """The noise levels of the pipeline's n steps, from 1 down; the last x0 is the image.

        Raises:
            ValueError: num_steps is below 1.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps}: the sampler needs at least 1 step")
        s = self.shift_of(num_tokens, num_steps)
        even = [1 - number / num_steps for number in range(num_steps)]
        shifted = [s * u / (1 + (s - 1) * u) for u in even]
        if not self.terminal or num_steps == 1:  # one step is pure noise: there is nothing to stretch
            return shifted
        factor = (1 - self.terminal) / (1 - shifted[-1])
        return [1 - (1 - sigma) * factor for sigma in shifted]

    def schedule(self, num_tokens: int, num_steps: int) -> FlowSchedule:
        """The training grid: all levels, shifted as the pipeline's steps are; nothing is stretched."""
        return FlowSchedule(self.shift_of(num_tokens, num_steps), self.num_levels)


def read_flow_shift(config: Mapping[str, Any], mu: Mu | None = None) -> FlowShift:
    """The shift that a scheduler's config describes.

    Args:
        config: of a FlowMatchEulerDiscreteScheduler, without keys that `families.flow.SCHEDULER_KEYS` does not read.
        mu: the pipeline's own rule, where a dynamic shift is not the line over image tokens that the config gives.

    Raises:
        ValueError: values that give no noise schedule.
    """
    shift, levels = float(config.get("shift", 1.0)), int(config.get("num_train_timesteps", 1000))
    terminal = float(config.get("shift_terminal") or 0.0)
    if not 0 < shift < 1e6:
        raise ValueError(f"the scheduler's shift={shift:g} gives no noise schedule")
    if not 0 <= terminal < 1:
        raise ValueError(f"the scheduler's shift_terminal={terminal:g} does not lie between 0 and 1")
    if not config.get("use_dynamic_shifting"):
        return FlowShift(shift, terminal=terminal, num_levels=levels)
    exponential = config.get("time_shift_type", "exponential") == "exponential"
    if mu is not None:
        return FlowShift(mu=mu, is_exponential=exponential, terminal=terminal, num_levels=levels)
    low, high = int(config.get("base_image_seq_len", 256)), int(config.get("max_image_seq_len", 4096))
    first, last = float(config.get("base_shift", 0.5)), float(config.get("max_shift", 1.15))
    if low >= high:
        raise ValueError(f"the scheduler's base_image_seq_len={low} is not below its max_image_seq_len={high}")

    def line(num_tokens: int, num_steps: int) -> float:
        return first + (last - first) * (num_tokens - low) / (high - low)

    return FlowShift(mu=line, is_exponential=exponential, terminal=terminal, num_levels=levels, max_tokens=high)
