"""Metrics and pictures go to a tracker where the environment names one; neither package is needed to test that."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fewstep.errors import UserError
from fewstep.training.run import train
from fewstep.training.run_log import RunLog
from tests.training.helpers import tiny_train_settings


class Library(ModuleType):
    """What both packages have in common, with their rule that steps never go back."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.told: dict[str, Any] = {}
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **told: Any) -> "Library":
        self.told = told
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        assert not self.rows or step >= self.rows[-1][0]
        self.rows.append((step, values))

    def Image(self, picture: Any) -> Any:
        return picture.size

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    found = Library(request.param)
    monkeypatch.setitem(sys.modules, request.param, found)
    monkeypatch.setenv("FEWSTEP_TRACKER", request.param)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("library", ["wandb", "trackio"], indirect=True)
def test_a_run_tells_its_tracker(
    library: Library, teacher_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{library.__name__.upper()}_PROJECT", "mine")
    run = train(tiny_train_settings(teacher_folder, pictures, tmp_path / "run", run={"sample_every": 2}))
    assert (library.told["project"], library.told["name"], library.finished) == ("mine", "run", 1)
    assert library.told["config"]["training"]["num_steps"] == 6
    assert library.told.get("mode") == ("offline" if library.__name__ == "wandb" else None)
    rates = {step: values["images_per_second"] for step, values in library.rows if "images_per_second" in values}
    assert rates == {int(row["step"]): row["images_per_second"] for row in run.metrics if "images_per_second" in row}
    assert len(rates) == 6
    pictured = [step for step, values in library.rows if "generator" in values]
    assert set(pictured) == {1, 2, 4, 6}


@pytest.mark.parametrize("library", ["wandb"], indirect=True)
def test_a_key_or_a_mode_decides_where_the_files_go(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    for name, value in (("WANDB_API_KEY", "k"), ("WANDB_MODE", "disabled")):
        monkeypatch.setenv(name, value)
        RunLog(tmp_path, 0, tensorboard=False).close()
        modes.append(library.told["mode"])
    assert modes == ["online", "disabled"]
    assert library.told["id"] == library.told["id"].lower()


def test_without_the_variable_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWSTEP_TRACKER", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = RunLog(tmp_path, 0, tensorboard=False)
    log.add(0, {"loss": torch.tensor(1.0)}, {})
    assert log.flush()["loss"] == 1
    log.close()


@pytest.mark.parametrize(
    ("name", "told"), [("wandb", "needs the package: pip install wandb"), ("mlflow", "choose wandb or trackio")]
)
def test_a_tracker_that_is_not_there(name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_TRACKER", name)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=told):
        RunLog(tmp_path, 0, tensorboard=False)
