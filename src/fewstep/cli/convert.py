"""`fewstep convert`: other tools' weights into a folder to sample and train from."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import starting
from fewstep.errors import UserError
from fewstep.progress import Stderr, busy


def convert(
    source: Annotated[Path, typer.Argument(help="EDM .pkl, DMD2 checkpoint folder, U-Net .bin, LoRA or single-file .safetensors")],
    out: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    base: Annotated[str, typer.Option(help="the model it belongs to: diffusers folder or hub id, needed for text-to-image weights; for EDM networks a teacher, where their shape cannot be read from the weights")] = "",
    step_indices: Annotated[str, typer.Option(help="grid indices a generator runs at, e.g. 999,749,499,249; default: EDM 999, released files by their name")] = "",
) -> None:  # fmt: skip
    """Turn other tools' weights into a folder to sample and train from; nothing in the file is executed."""
    indices = _parse_indices(step_indices)
    with starting():
        from fewstep.preparation.convert import convert_weights
    with busy(Stderr(), f"Converting {source}"):
        told = convert_weights(source, out, base=base, step_indices=indices)
    print(told)


def _parse_indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace(" ", "").split(",") if part)
    except ValueError:
        raise UserError(
            f"--step-indices {text}: give whole numbers separated by commas, e.g. 999,749,499,249"
        ) from None
