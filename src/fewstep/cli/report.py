"""`fewstep report`: one page of a run, or of several beside each other."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import Device, starting
from fewstep.errors import UserError


def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders of `fewstep train` or `pretrain`, finished or not", metavar="RUN...")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write; run_report.html in the first run, unless set")] = None,
    neighbours: Annotated[str, typer.Option(help="show the nearest real picture of each sample: loads this feature network (as `evaluate --features`) and the run's real pictures", metavar="FEATURES")] = "",
    images: Annotated[str, typer.Option(help="with --neighbours: real pictures, where they are not the run's data.images")] = "",
    device: Device = "auto",
) -> None:  # fmt: skip
    """One page of a run: samples through training, quality, losses, speed, settings; of several runs beside each other."""
    if images and not neighbours:
        raise UserError(f"--images {images} belongs to --neighbours FEATURES; give one")
    with starting():
        from fewstep.evaluation.asked import refuse_no_place
        from fewstep.evaluation.report.run_report import write_run_report
    path = out or runs[0] / "run_report.html"
    refuse_no_place("--out", out)
    more = []
    if neighbours:
        from fewstep.evaluation.report.memorisation import memorisation_sections
        from fewstep.evaluation.report.run_files import read_run
        from fewstep.evaluation.report.run_report import told_apart

        for run in told_apart([read_run(run) for run in runs]):
            more += memorisation_sections(run, neighbours, images, device)
    print(write_run_report(runs, path, more))
