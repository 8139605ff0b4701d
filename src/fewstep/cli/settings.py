"""`fewstep settings`: every setting with its default and meaning."""

from typing import Annotated

import typer

from fewstep.errors import UserError


def settings(
    command: Annotated[str, typer.Argument(help="train or pretrain")] = "train",
) -> None:
    """List every setting of a command with its default and meaning."""
    from rich.console import Console
    from rich.table import Table

    from fewstep.settings import PretrainSettings, TrainSettings, Tree, describe_settings

    kinds: dict[str, type[Tree]] = {"train": TrainSettings, "pretrain": PretrainSettings}
    if command not in kinds:
        raise UserError(f"settings of {command!r}? choose train or pretrain")
    table = Table()
    table.add_column("setting", no_wrap=True)
    table.add_column("default")
    table.add_column("meaning")
    for key, _, default, meaning in describe_settings(kinds[command]):
        table.add_row(key, default, meaning)
    Console().print(table)
