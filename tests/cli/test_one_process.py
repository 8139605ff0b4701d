"""Under torchrun only what knows of several processes runs: others would write the same files at once."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.cli.options import tell
from fewstep.errors import UserError
from fewstep.settings import TrainSettings, load_settings


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


@pytest.mark.parametrize(("rank", "said"), [("0", ["now optimizer.lr = [0.001, 0.001]"]), ("1", [])])
def test_earlier_names_are_told_by_the_first_process(
    rank: str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe is read before the processes meet, and by each of them."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[optimizer]\ngenerator_lr = 1e-3\nfake_score_lr = 1e-3\n", encoding="utf-8")
    monkeypatch.setenv("RANK", rank)
    load_settings(TrainSettings, recipe, None, tell)
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == said
