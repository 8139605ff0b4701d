"""What `train` and `pretrain` share: recipes at hand, the run folder, the dry run."""

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fewstep.cli.examples import EXAMPLES
from fewstep.cli.options import tell
from fewstep.progress import Stderr, busy


def with_folder(settings: Any, recipe: Path) -> Any:
    """Runs go to runs/<recipe name> unless the settings say otherwise."""
    if settings.run.folder:
        return settings
    return settings.model_copy(update={"run": settings.run.model_copy(update={"folder": f"runs/{recipe.stem}"})})


def settled(settings: Any) -> Any:
    """The settings with the precision that this machine would take."""
    from fewstep.training.precision import settle_precision
    from fewstep.training.run import run_folder

    return settle_precision(settings, run_folder(settings), tell)


def print_dry_run(settings: Any, lines: Iterable[str]) -> None:
    """The settings at once, then each line as it becomes known."""
    from fewstep.settings import flatten_settings

    for key, value in flatten_settings(settings).items():
        print(f"{key} = {value!r}")
    print(flush=True)
    console, left = Stderr(), iter(lines)
    while True:
        with busy(console, "Rehearsing the run"):
            line = next(left, None)
        if line is None:
            return
        print(line, flush=True)


def show_how_to_begin(command: str, marks: tuple[str, ...]) -> None:
    """What the command is for and which recipes are at hand, where none was named.

    Args:
        command: train or pretrain.
        marks: sections that only its recipes have.
    """
    print(f"usage: fewstep {command} RECIPE [section.key=value ...]   (--dry-run shows what it would take)\n")
    found = [path for path in sorted(Path("recipes").glob("*.toml")) if _is_of(path, marks)]
    if not found:
        print("There is no folder recipes/ here: go to a clone of the repository, or name a recipe of your own (TOML).")
    else:
        print("Recipes here:\n")
        for path in found:
            comment = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
            print(f"  {path.as_posix()}\n      {comment}")
        print(f"\ne.g. {EXAMPLES[command]}")
    print(f"\n`fewstep settings {command}` lists every setting; `fewstep quickstart` needs no recipe and no data.")


def _is_of(path: Path, marks: tuple[str, ...], depth: int = 8) -> bool:
    """Whether a recipe, or the one it extends, has one of these sections."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    parent = values.get("extends")
    if any(mark in values for mark in marks):
        return True
    return isinstance(parent, str) and depth > 0 and _is_of(path.parent / parent, marks, depth - 1)
