"""Saying what is being done before it is done, and how far it is: a bar in a terminal, lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fewstep.evaluation.measure import Report

LINE_EVERY_SECONDS = 5.0


@contextmanager
def working(console: Console, what: str) -> Iterator[Report]:
    """Yields what takes (done, in all): moves a bar in a terminal, which also shows that time passes, prints lines elsewhere."""
    if not console.is_terminal:
        yield lines(console, what)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def lines(console: Console, what: str) -> Report:
    """Prints `what` now, then how far it is every few seconds; also fit beside another bar."""
    say(console, f"{what} ...")
    last = time.perf_counter()

    def report(done: int, total: int) -> None:
        nonlocal last
        if 0 < done < total and time.perf_counter() - last >= LINE_EVERY_SECONDS:
            last = time.perf_counter()
            say(console, f"{what}: {done:,} of {total:,}")

    return report


def say(console: Console, line: str) -> None:
    """One line as it is: no markup, no breaking, no colours."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
