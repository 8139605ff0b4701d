"""`fewstep pretrain`: train a teacher on pictures."""

from fewstep.cli.options import DataChanged, DryRun, Overrides, TeacherRecipe, starting, tell
from fewstep.cli.recipe_runs import print_dry_run, settled, show_how_to_begin, with_folder


def pretrain(
    recipe: TeacherRecipe = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    data_changed: DataChanged = False,
) -> None:
    """Train a teacher on a folder of pictures. The same command continues an interrupted run."""
    if recipe is None:
        show_how_to_begin("pretrain", ("network",))
        return
    from fewstep.settings import PretrainSettings, load_settings

    settings = load_settings(PretrainSettings, recipe, overrides, tell)
    settings = with_folder(settings, recipe)
    if dry_run:
        with starting():
            from fewstep.estimate.describe import describe_pretraining
            from fewstep.training.inferred import suppose_network
        settings = suppose_network(settled(settings), tell)
        print_dry_run(settings, describe_pretraining(settings))
        return
    with starting():
        from fewstep.training.run import pretrain as run
    print(run(settings, data_changed=data_changed).model_folder)
