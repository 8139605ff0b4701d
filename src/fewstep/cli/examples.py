"""One command line that works, for the end of each `--help`."""

import typer

EXAMPLES = {
    "train": "fewstep train recipes/my_pictures_dmd2.toml data.images=MY_FOLDER",
    "pretrain": "fewstep pretrain recipes/my_pictures.toml data.images=MY_FOLDER",
    "settings": "fewstep settings pretrain",
    "doctor": "fewstep doctor",
    "quickstart": "fewstep quickstart --minutes 2",
    "text-quickstart": "fewstep text-quickstart --minutes 2",
    "sample": "fewstep sample bundled:fashion-mnist --num-images 16 --grid clothes.png",
    "evaluate": "fewstep evaluate runs/quickstart --features bundled:fashion-mnist --images MY_FOLDER --num-images 1000",
    "report": "fewstep report runs/quickstart",
    "convert": "fewstep convert edm-imagenet-64x64-cond-adm.pkl teachers/adm",
    "export": "fewstep export runs/text-quickstart exported --as lora",
    "app": "fewstep app runs/text-quickstart --teacher bundled:emoji-sd",
    "pairs": "fewstep prepare pairs bundled:fashion-mnist data/pairs --num-pairs 1000",
    "embeddings": "fewstep prepare embeddings bundled:emoji-sd prompts.txt data/prompts",
    "latents": "fewstep prepare latents bundled:emoji-sd data/latents --images MY_CAPTIONED_PICTURES",
    "features": "fewstep prepare features MY_FOLDER runs/features --num-classes 10",
    "statistics": "fewstep prepare statistics MY_FOLDER real.npz --features runs/features",
}


def add_examples(*apps: typer.Typer) -> None:
    """Put its example below the help of every command."""
    for app in apps:
        for command in app.registered_commands:
            name = command.name or (command.callback.__name__ if command.callback is not None else "")
            command.epilog = f"Example: {EXAMPLES[name]}"
