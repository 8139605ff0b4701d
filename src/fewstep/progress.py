"""Saying what is being done before it is done, and how far it is: a bar in a terminal, lines elsewhere."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PATIENCE_SECONDS = 1.0  # work that is over sooner is not spoken of where there is no terminal
LINE_EVERY_SECONDS = 5.0
STILL_EVERY_SECONDS = 30.0  # between lines about work that does not say how far it is

_settings = {"quiet": False}


def be_quiet(quiet: bool) -> None:
    """Whether bars and lines about progress are left out; warnings are not."""
    _settings["quiet"] = quiet


class Stderr(Console):
    """Standard error, where people are told what is being done."""

    def __init__(self) -> None:
        super().__init__(stderr=True)

    @property
    def quiet(self) -> bool:
        """Whether nothing is written."""
        return _settings["quiet"]

    @quiet.setter
    def quiet(self, value: bool) -> None:
        pass  # rich's own start; `be_quiet` decides


Report = Callable[[int, int | None], None]
"""Takes (done, in all); None where it is not known how many there are."""


@contextmanager
def busy(console: Console, what: str) -> Iterator[None]:
    """Names work that cannot say how far it is: a moving sign with the time in a terminal; lines elsewhere, after a second."""
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            progress.add_task(what, total=None)
            yield
        return
    begun = time.perf_counter()

    def still() -> None:
        say(console, f"{what}: {time.perf_counter() - begun:.0f} s")

    with every(STILL_EVERY_SECONDS, still, partial(say, console, f"{what} ...")):
        yield


@contextmanager
def every(seconds: float, tell: Callable[[], None], first: Callable[[], None] | None = None) -> Iterator[None]:
    """Calls `first` after a second, then `tell` again and again, from another thread, whatever this one is doing."""
    over = threading.Event()

    def run() -> None:
        if first is not None and not over.wait(PATIENCE_SECONDS):
            first()
        while not over.wait(seconds):
            tell()

    thread = threading.Thread(target=run, daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def working(console: Console, what: str) -> Iterator[Report]:
    """Yields what takes (done, in all): moves a bar in a terminal, which also shows that time passes; prints lines elsewhere,
    where the work takes more than a second."""
    if not console.is_terminal:
        report = _Lines(console, what)
        with every(STILL_EVERY_SECONDS, report.still, report.name):
            yield report
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def lines(console: Console, what: str) -> Report:
    """Prints `what` now, then how far it is every few seconds; also fit beside another bar."""
    report = _Lines(console, what)
    report.name()
    return report


class _Lines:
    """A `Report` as lines."""

    def __init__(self, console: Console, what: str) -> None:
        self.console, self.what = console, what
        self._begun = self._last = time.perf_counter()

    def name(self) -> None:
        """Say what is being done."""
        say(self.console, f"{self.what} ...")

    def still(self) -> None:
        """Say that it goes on, where nothing else was said for as long."""
        now = time.perf_counter()
        if now - self._last >= STILL_EVERY_SECONDS:
            say(self.console, f"{self.what}: {now - self._begun:.0f} s")

    def __call__(self, done: int, total: int | None) -> None:
        now = time.perf_counter()
        if 0 < done != total and now - self._last >= LINE_EVERY_SECONDS:
            self._last = now
            left = f" of {total:,}, {duration((now - self._begun) * (total - done) / done)} left" if total else ""
            say(self.console, f"{self.what}: {done:,}{left}")


def duration(seconds: float) -> str:
    """As people say it: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def tell(line: str) -> None:
    """One line on standard error, where nothing else was asked for."""
    say(Stderr(), line)


def say(console: Console, line: str) -> None:
    """One line as it is, however long: no markup, no breaking; warnings in yellow, also where the rest is quiet."""
    style = "yellow" if line.startswith("warning") else ""
    if style and isinstance(console, Stderr) and console.quiet:
        console = Console(stderr=True)
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
