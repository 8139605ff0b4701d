"""How long a step waits for data: by the host's clock, around what is read and decoded before it goes to a device.

Nothing waits for a device here, so what a GPU still has to do is not counted as waiting, nor is encoding captions in a step.
"""

import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Stopwatch:
    """Adds up seconds.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, read: Callable[P, T]) -> Callable[P, T]:
        """A function whose time counts."""

        @wraps(read)
        def counted(*arguments: P.args, **named: P.kwargs) -> T:
            began = time.perf_counter()
            try:
                return read(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - began

        return counted


WAITING = Stopwatch()  # of this process; only what the training thread itself calls is wrapped, not what it reads ahead
