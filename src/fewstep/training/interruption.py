"""Ctrl-C and SIGTERM in a run: the step that is being made ends, then the run can save itself. A second Ctrl-C ends at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

from fewstep.errors import RunInterrupted, stopped_by
from fewstep.parallel import is_first
from fewstep.training.checkpoint import list_checkpoints

_PATIENCE_SECONDS = 1.0

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
        self._line = threading.Timer(_PATIENCE_SECONDS, _say_how_to_end)
        self._line.daemon = True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._line.cancel()
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
        if self.signal is None and is_first():
            self._line.start()
        self.signal = signal.Signals(number)
        if self._at_once:
            raise StopNow


def _say_how_to_end() -> None:
    os.write(2, b"\nfewstep: stopping after this step; Ctrl-C again ends at once\n")


@contextmanager
def naming_checkpoint(folder: Path) -> Iterator[None]:
    """Around a whole run: where Ctrl-C or SIGTERM finds it before or after its steps, or Ctrl-C a second time, the last checkpoint is named.

    Raises:
        RunInterrupted: instead of KeyboardInterrupt.
    """
    try:
        yield
    except RunInterrupted:
        raise
    except KeyboardInterrupt as stop:
        name, code = stopped_by(stop)
        checkpoints = list_checkpoints(folder / "checkpoints")
        kept = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
        raise RunInterrupted(f"stopped by {name}; {kept}", code) from None
