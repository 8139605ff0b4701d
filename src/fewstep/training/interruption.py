"""Ctrl-C and SIGTERM in a run: the step that is being made ends, then the run can save itself. A second Ctrl-C ends at once."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopNow(BaseException):
    """Leaves a piece of work that may be interrupted anywhere."""


class Interruption:
    """Listens to both signals inside a `with` block, in the main thread; elsewhere they keep what they do.

    Attributes:
        signal: the one that asked the run to stop, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._at_once = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def at_once(self, work: Callable[[], None]) -> None:
        """Do work that is given up when a signal comes, because it is made again when the run goes on."""
        self._at_once = True
        try:
            if self.signal is None:
                work()
        except StopNow:
            pass
        finally:
            self._at_once = False

    @property
    def name(self) -> str:
        """What asked, as people call it."""
        return "Ctrl-C" if self.signal == signal.SIGINT else "SIGTERM"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if self._at_once:
            raise StopNow
