"""What a time budget is worth on this machine, said as soon as its speed is known and not when the time is spent."""

import math
from collections.abc import Callable

from fewstep.settings import PretrainSettings

ENOUGH_IMAGES = 500_000
"""Pictures that a small teacher sees before its own are good: of docs/own-pictures.md, the table of what came out."""
_KNOWN_AFTER_SECONDS = 20.0
_KNOWN_AFTER_SHARE = 0.05


class Outlook:
    """Called after every step of a teacher's training with a time limit; tells once how many pictures it will see.

    Args:
        settings: of the run.
        num_pictures: in its data set.
        report: called with a line for people.
    """

    def __init__(self, settings: PretrainSettings, num_pictures: int, report: Callable[[str], None]) -> None:
        self.limit, self.batch_size = settings.training.time_limit_minutes * 60, settings.training.batch_size
        self.num_pictures, self.report, self.told = num_pictures, report, False

    def __call__(self, step: int, seconds: float) -> None:
        """After `step` steps in so many seconds of training."""
        if self.told or not self.limit or seconds < min(_KNOWN_AFTER_SECONDS, _KNOWN_AFTER_SHARE * self.limit):
            return
        self.told = True
        rate = step * self.batch_size / seconds
        images = rate * self.limit
        passes = images / self.num_pictures
        line = (
            f"at {rate:.3g} images/s the {self.limit / 60:g} minutes are about {images / self.batch_size:,.0f} steps: "
            f"{images:,.0f} pictures seen, each of the {self.num_pictures:,} about {passes:,.{0 if passes >= 10 else 1}f} times"
        )
        if images < ENOUGH_IMAGES:
            minutes = 5 * math.ceil(ENOUGH_IMAGES / rate / 60 / 5)
            line = (
                f"warning: {line}; that is little: expect blurs below {ENOUGH_IMAGES:,} "
                f"(training.time_limit_minutes={minutes} here), or train on a faster machine"
            )
        self.report(line)
