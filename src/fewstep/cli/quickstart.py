"""`fewstep quickstart` and `fewstep text-quickstart`: a bundled teacher distilled here, on one page."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import starting


def quickstart(
    minutes: Annotated[float, typer.Option(help="minutes of training; measuring and the report come on top")] = 5.0,
    folder: Annotated[Path, typer.Option(help="run folder; an interrupted run in it is continued")] = Path(
        "runs/quickstart"
    ),
    seed: Annotated[int, typer.Option(help="every random number follows from it")] = 0,
    text: Annotated[
        bool, typer.Option("--text", help="the text-to-image teacher instead, as `text-quickstart`")
    ] = False,
) -> None:
    """Distil the bundled teacher on the CPU: pictures, quality and speed in one HTML report."""
    if text:
        text_quickstart(minutes, Path("runs/text-quickstart") if folder == Path("runs/quickstart") else folder, seed)
        return
    with starting():
        from fewstep.demos.fashion_mnist import run_quickstart
    run_quickstart(folder, minutes=minutes, seed=seed)


def text_quickstart(
    minutes: Annotated[float, typer.Option(help="minutes of training; measuring and the report come on top")] = 5.0,
    folder: Annotated[Path, typer.Option(help="run folder; an interrupted run in it is continued")] = Path(
        "runs/text-quickstart"
    ),
    seed: Annotated[int, typer.Option(help="every random number follows from it")] = 0,
) -> None:
    """The same for text: the bundled emoji teacher becomes a four-step LoRA, prompts beside pictures in one HTML report."""
    with starting():
        from fewstep.models.load import need_text_libraries

        need_text_libraries()
        from fewstep.demos.emoji import run_text_quickstart
    run_text_quickstart(folder, minutes=minutes, seed=seed)
