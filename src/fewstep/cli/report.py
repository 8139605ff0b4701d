"""`fewstep report`: one page of a run, or of several beside each other."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import starting
from fewstep.errors import UserError


def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders of `fewstep train` or `pretrain`, finished or not", metavar="RUN...")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write; run_report.html in the first run, unless set")] = None,
) -> None:  # fmt: skip
    """One page of a run: losses, sample history, measured figures, settings; of several runs beside each other."""
    with starting():
        from fewstep.evaluation.report.run_report import write_run_report
    path = out or runs[0] / "run_report.html"
    if out is not None and not path.absolute().parent.is_dir():
        raise UserError(f"--out {path}: the folder {path.parent} does not exist; make it first")
    print(write_run_report(runs, path))
