"""Under torchrun only what knows of several processes runs: others would write the same files at once."""

import pytest
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.errors import UserError


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["sample", "bundled:fashion-mnist", "--grid", "g.png"], "sample"),
        (["prepare", "pairs", "m", "p", "--from-lmdb", "x"], "prepare pairs --from-lmdb"),
        (["prepare", "statistics", "x", "s.npz", "--features", "f"], "prepare statistics"),
        (["pretrain", "recipes/my_pictures.toml"], "pretrain"),
        (["quickstart"], "quickstart"),
        (["evaluate", "runs/x", "--features", "f", "--watch"], "evaluate --watch"),
    ],
)
def test_commands_of_one_process(words: list[str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer = CliRunner().invoke(app, words)
    assert isinstance(answer.exception, UserError)
    assert str(answer.exception) == f"{name} runs in one process: start it without torchrun"
