"""Arguments that several commands have, and what they become. Light: no heavy import."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from fewstep.errors import UserError

Recipe = Annotated[Path | None, typer.Argument(help="TOML recipe, e.g. recipes/imagenet64_dmd2_gan.toml")]
TeacherRecipe = Annotated[Path | None, typer.Argument(help="TOML recipe, e.g. recipes/my_pictures.toml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="settings as section.key=value; `fewstep settings` lists all")
]
DataChanged = Annotated[
    bool, typer.Option("--data-changed", help="go on with other data than the interrupted run began with")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved settings and a memory estimate, then stop")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps")]
Precision = Annotated[
    str, typer.Option(help="auto, fp32, bf16 or fp16 inside the network; auto: what is fast on the device")
]
AnyPrecision = Annotated[
    str,
    typer.Option(
        help="auto, fp32, bf16 or fp16 inside the network (auto: what is fast on the device); the VAE stays in fp32"
    ),
]


@contextmanager
def starting() -> Iterator[None]:
    """Around a command's heavy imports, which take seconds."""
    from fewstep.progress import Stderr, busy

    with busy(Stderr(), "Loading torch") if speaks() else nullcontext():
        yield


def speaks() -> bool:
    """Whether this process is the one of many that speaks; known before torch is loaded."""
    return os.environ.get("RANK", "0") == "0"


def read_prompts(given: list[str], file: str) -> list[str]:
    """Prompts given one by one, then those of a file."""
    if not file:
        return list(given)
    from fewstep.data.prompts import load_prompts

    return [*given, *load_prompts(Path(file).expanduser())]


def tell(line: str) -> None:
    """One line on standard error, of many processes by the first."""
    from fewstep import progress

    if speaks():
        progress.tell(line)


def how_to_continue() -> str:
    """The command that goes on with what this one was stopped at."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "Continue with the same torchrun command, on any number of processes"
    return f"Continue with: {shlex.join(['fewstep', *sys.argv[1:]])}"


def num_processes() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_many(command: str | None) -> None:
    """Refuse torchrun for a command of one process: several would write the same files.

    Raises:
        UserError: there are several processes.
    """
    if num_processes() > 1 and command is not None:
        raise UserError(f"{command} runs in one process: start it without torchrun")
