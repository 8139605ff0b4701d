"""`fewstep train`: distil a teacher."""

from typing import Annotated

import typer

from fewstep.cli.options import DataChanged, DryRun, Overrides, Recipe, starting, tell
from fewstep.cli.recipe_runs import print_dry_run, settled, show_how_to_begin, with_folder
from fewstep.errors import UserError


def train(
    recipe: Recipe = None, overrides: Overrides = None, dry_run: DryRun = False,
    suggest_gan_weight: Annotated[bool, typer.Option("--suggest-gan-weight", help="measure gradient norms for a few updates in memory, print a GAN weight, then stop")] = False,
    data_changed: DataChanged = False,
    gpus: Annotated[int, typer.Option(min=1, help="with --dry-run: so many processes with a GPU each, too")] = 1,
    gpu: Annotated[str, typer.Option(help="with --dry-run --gpus: rtx4090, l40s, a100, h100 or h200")] = "h100",
) -> None:  # fmt: skip
    """Distil a teacher into a generator. The same command continues an interrupted run."""
    if recipe is None:
        show_how_to_begin("train", ("teacher",))
        return
    from fewstep.settings import TrainSettings, load_settings

    settings = load_settings(TrainSettings, recipe, overrides, tell)
    settings = with_folder(settings, recipe)
    if gpus > 1 and not dry_run:
        raise UserError(
            "--gpus belongs to --dry-run; to train on several, start the command with torchrun (docs/scaling.md)"
        )
    if dry_run:
        with starting():
            from fewstep.estimate.describe import describe_distillation
        settings = settled(settings)
        lines = describe_distillation(settings, tell, gpus, gpu)
        print_dry_run(settings, lines)
        return
    if suggest_gan_weight:
        with starting():
            from fewstep.training.run import print_gan_weight
        print_gan_weight(settings)
        return
    with starting():
        from fewstep.parallel import is_first
        from fewstep.training.run import train as run
    finished = run(settings, data_changed=data_changed)
    if is_first():
        print(finished.model_folder)
