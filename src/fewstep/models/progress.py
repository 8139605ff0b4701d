"""A bar while pictures are made, where somebody sees it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from fewstep.progress import Stderr


@contextmanager
def counted_evaluations(network: nn.Module, total: int, *, shown: bool) -> Iterator[None]:
    """Show how many of `total` forwards of a network are done, on a terminal or in a notebook."""
    console = Stderr()
    if not shown or not total or not (console.is_terminal or console.is_jupyter):
        yield
        return
    columns = (TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), TextColumn("evaluations"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("pictures", total=total)

        def count(module: nn.Module, inputs: Any, output: Any) -> None:
            bar.advance(task)

        handle = network.register_forward_hook(count)
        try:
            yield
        finally:
            handle.remove()
