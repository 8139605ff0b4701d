"""What a run will take and be worth on this machine, said as soon as its speed is known and not when the time is spent."""

import math
from collections.abc import Callable

from fewstep.progress import duration
from fewstep.settings import PretrainSettings, TrainSettings

ENOUGH_IMAGES = 500_000
"""Pictures that a small teacher sees before its own are good: of docs/own-pictures.md, the table of what came out."""
_KNOWN_AFTER_SECONDS = 20.0
_KNOWN_AFTER_SHARE = 0.05


class Outlook:
    """Called after every step of a run; tells once how long its steps will take, or how many its time limit is good for.

    Args:
        settings: of the run.
        num_pictures: in a teacher's data set, of which a time limit that is too small for them is a warning; 0 for a student.
        report: called with a line for people.
    """

    def __init__(
        self, settings: PretrainSettings | TrainSettings, num_pictures: int, report: Callable[[str], None]
    ) -> None:
        self.limit, self.batch_size = settings.training.time_limit_minutes * 60, settings.training.batch_size
        self.num_steps = settings.training.num_steps
        self.num_pictures, self.report, self.told = num_pictures, report, False
        self._first: tuple[int, float] | None = None

    def __call__(self, step: int, seconds: float) -> None:
        """After `step` steps in so many seconds of training; the first one of a session, which warms up, does not count."""
        if self._first is None:
            self._first = step, seconds
        since = seconds - self._first[1]
        share = _KNOWN_AFTER_SHARE * self.limit if self.limit else _KNOWN_AFTER_SECONDS
        if self.told or since <= 0 or since < min(_KNOWN_AFTER_SECONDS, share):
            return
        self.told = True
        rate = (step - self._first[0]) * self.batch_size / since
        left = (self.num_steps - step) * self.batch_size / rate
        by_clock = bool(self.limit) and seconds + left > self.limit
        if by_clock:
            self.report(self._of_time(rate, step, seconds))
        elif step < self.num_steps:
            self.report(f"at {rate:.3g} images/s the {self.num_steps - step:,} steps left take about {duration(left)}")

    def _of_time(self, rate: float, step: int, seconds: float) -> str:
        """What the time limit is good for."""
        images = step * self.batch_size + rate * max(0.0, self.limit - seconds)
        line = f"at {rate:.3g} images/s the {self.limit / 60:g} minutes are about {images / self.batch_size:,.0f} steps: {images:,.0f} pictures"
        if not self.num_pictures:
            return line
        passes = images / self.num_pictures
        line += f" seen, each of the {self.num_pictures:,} about {passes:,.{0 if passes >= 10 else 1}f} times"
        if images >= ENOUGH_IMAGES:
            return line
        minutes = 5 * math.ceil((seconds + (ENOUGH_IMAGES - step * self.batch_size) / rate) / 60 / 5)
        return (
            f"warning: {line}; that is little: expect blurs below {ENOUGH_IMAGES:,} "
            f"(training.time_limit_minutes={minutes} here), or train on a faster machine"
        )
