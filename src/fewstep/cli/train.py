"""`fewstep train`: distil a teacher."""

import sys
from typing import Annotated

import typer

from fewstep.cli.options import DataChanged, DryRun, Overrides, Recipe, starting, tell
from fewstep.cli.recipe_runs import print_dry_run, settled, show_how_to_begin, with_folder


def train(
    recipe: Recipe = None, overrides: Overrides = None, dry_run: DryRun = False,
    suggest_gan_weight: Annotated[bool, typer.Option("--suggest-gan-weight", help="measure gradient norms for a few updates in memory, print a GAN weight, then stop")] = False,
    data_changed: DataChanged = False,
) -> None:  # fmt: skip
    """Distil a teacher into a generator. The same command continues an interrupted run."""
    if recipe is None:
        show_how_to_begin("train", ("teacher",))
        return
    from fewstep.settings import TrainSettings, load_settings

    settings = load_settings(TrainSettings, recipe, overrides, tell)
    settings = with_folder(settings, recipe)
    if dry_run:
        with starting():
            from fewstep.estimate.describe import describe_distillation
        settings = settled(settings)
        print_dry_run(settings, describe_distillation(settings, lambda text: print(text, file=sys.stderr, flush=True)))
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
