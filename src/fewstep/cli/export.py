"""`fewstep export`: a generator in another tool's format."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import Device, starting
from fewstep.progress import Stderr, busy


def export(
    generator: Annotated[str, typer.Argument(help="generator folder, or run folder of `fewstep train`")],
    out: Annotated[Path, typer.Argument(help="new folder to write")],
    *,
    kind: Annotated[str, typer.Option("--as", help="diffusers, unet, lora, kohya-lora, single-file or edm")] = "diffusers",
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32; unless set the precision of its family: fp16 or bf16 as its pipeline is used, fp32 for class-conditional generators")] = "",
    base: Annotated[str, typer.Option(help="text-to-image: the teacher's folder or hub id, if it has moved since training")] = "",
    prompt: Annotated[list[str] | None, typer.Option(help="text-to-image: prompt of the sample pictures; may be given several times")] = None,
    num_samples: Annotated[int, typer.Option(min=0, help="sample pictures in the model card")] = 8,
    licence: Annotated[str, typer.Option(help="of the weights, as the hub names it, e.g. apache-2.0")] = "",
    push: Annotated[str, typer.Option(help="upload to this name on the model hub (USER/NAME) afterwards; default: upload nothing")] = "",
    device: Device = "auto",
) -> None:  # fmt: skip
    """Write a generator in another tool's format, with a model card and sample pictures."""
    with starting():
        from fewstep.export.export import ExportOptions, export_generator
        from fewstep.export.hub import push_export
    console = Stderr()
    options = ExportOptions(
        kind=kind, precision=dtype, base=base, prompts=tuple(prompt or ()), num_samples=num_samples, licence=licence,
        repo=push, device=device, tell=console.print,
    )  # fmt: skip
    with busy(console, f"Exporting {generator}"):
        folder = export_generator(generator, out, options)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    console.print(f"{len(files)} files, {sum((folder / name).stat().st_size for name in files) / 2**20:.1f} MiB")
    if push:
        with busy(console, f"Uploading to {push}"):
            told = push_export(folder, push)
        console.print(told)
    print(folder)
