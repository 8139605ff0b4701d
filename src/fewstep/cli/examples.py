"""What all commands have in common: `~` in their paths, and one command line that works at the end of each `--help`."""

from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

EXAMPLES = {
    "train": "fewstep train recipes/my_pictures_small_dmd2.toml data.images=MY_FOLDER",
    "pretrain": "fewstep pretrain recipes/my_pictures_small.toml data.images=MY_FOLDER",
    "settings": "fewstep settings pretrain",
    "doctor": "fewstep doctor",
    "quickstart": "fewstep quickstart --minutes 2",
    "text-quickstart": "fewstep text-quickstart --minutes 2",
    "sample": "fewstep sample bundled:fashion-mnist --num-images 16 --grid clothes.png",
    "evaluate": "fewstep evaluate runs/quickstart --features bundled:fashion-mnist --images MY_FOLDER --num-images 1000",
    "bench-inference": "fewstep bench-inference runs/quickstart",
    "report": "fewstep report runs/quickstart",
    "convert": "fewstep convert edm-imagenet-64x64-cond-adm.pkl teachers/adm",
    "export": "fewstep export runs/text-quickstart exported --as lora",
    "app": "fewstep app runs/text-quickstart --teacher bundled:emoji-sd",
    "pairs": "fewstep prepare pairs bundled:fashion-mnist data/pairs --num-pairs 1000",
    "embeddings": "fewstep prepare embeddings bundled:emoji-sd prompts.txt data/prompts",
    "latents": "fewstep prepare latents bundled:emoji-sd data/latents --images MY_CAPTIONED_PICTURES",
    "features": "fewstep prepare features MY_FOLDER runs/features",
    "statistics": "fewstep prepare statistics MY_FOLDER real.npz --features runs/features",
}


class PathCommand(TyperCommand):
    """A command whose paths may begin with ~, also where the shell leaves it (`--out=~/pictures`)."""

    def invoke(self, ctx: Any) -> Any:
        """Run it."""
        ctx.params = {name: _expanded(value) for name, value in ctx.params.items()}
        return super().invoke(ctx)


def _expanded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_expanded(part) for part in value)
    return value.expanduser() if isinstance(value, Path) else value


def add_examples(*apps: typer.Typer) -> None:
    """Put its example below the help of every command, and let its paths begin with ~."""
    for app in apps:
        for command in app.registered_commands:
            name = command.name or (command.callback.__name__ if command.callback is not None else "")
            command.cls = PathCommand
            command.epilog = f"Example: {EXAMPLES[name]}"
