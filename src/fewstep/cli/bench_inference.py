"""`fewstep bench-inference`: how fast a generator is, beside its teacher."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import AnyPrecision, Device, starting


def bench_inference(
    model: Annotated[str, typer.Argument(help="generator: run folder, model folder or exported pipeline")],
    *,
    teacher: Annotated[str, typer.Option(help="its teacher; the one that its card names unless set")] = "",
    batch_sizes: Annotated[str, typer.Option(help="pictures made at once")] = "1,8,64",
    prompt: Annotated[str, typer.Option(help="of text-to-image models")] = "",
    seconds: Annotated[float, typer.Option(help="of each measurement; a round that takes longer is made twice, one far longer once")] = 5.0,
    compiled: Annotated[bool, typer.Option("--compile", help="time the generator under torch.compile, too")] = False,
    json_out: Annotated[Path | None, typer.Option("--json", help="write every timing and the machine here")] = None,
    device: Device = "auto",
    precision: AnyPrecision = "auto",
) -> None:  # fmt: skip
    """Latency and images per second of a generator against its own teacher at the teacher's usual steps, in one run."""
    with starting():
        from fewstep.evaluation.speed import SpeedOptions
        from fewstep.evaluation.speed import bench_inference as bench
    bench(model, SpeedOptions(teacher, batch_sizes, prompt, seconds, compiled, json_out, device, precision))
