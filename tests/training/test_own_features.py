"""`best.files = ["trained"]`: a run measures itself in a feature network that it trains of its own pictures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.errors import UserError
from fewstep.evaluation.features import SmallClassifier
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.evaluation.report.run_curves import _watch_notes
from fewstep.evaluation.report.run_files import read_run
from fewstep.models.load import load_generator
from fewstep.settings import TrainSettings
from fewstep.training import own_features
from fewstep.training.run import pretrain, train
from fewstep.training.watch import either, every_seconds, every_steps, read_points
from tests.conftest import write_pictures
from tests.training.helpers import tiny_pretrain_settings, tiny_train_settings

TRAINED: dict[str, Any] = {"files": ["trained"], "num_images": 50}


@pytest.fixture(autouse=True)
def _few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_features, "_SHOWN", 256)
    monkeypatch.setattr(own_features, "_REFERENCE_PICTURES", 20)
    return


def settings_of(teacher: Path, pictures: Path, folder: Path, **changes: dict[str, Any]) -> TrainSettings:
    return tiny_train_settings(teacher, pictures, folder, **{"best": TRAINED, **changes})


@pytest.mark.slow
def test_a_run_measures_itself(
    teacher_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(settings_of(teacher_folder, pictures, run))
    points = read_points(run / "best.json")
    assert [point.step for point in points] == [2, 4, 6]
    best = min(points, key=lambda point: point.figures["frechet_distance"])
    kept = load_generator(run / "best", device="cpu")
    assert kept.card.made_with["num_steps"] == best.step
    network = SmallClassifier.load(run / own_features.FEATURES)
    assert (network.resolution, network.channels, network.arguments["num_classes"]) == (16, 1, 4)
    assert FeatureStatistics.load(run / own_features.REFERENCE).num_images == 20
    told = f"the best generator, of step {best.step:.0f} ("
    assert told in capsys.readouterr().err
    assert (
        "50 images, features trained by the run, of its own pictures, seed 1"
        in _watch_notes(read_run(run), "best.json", several=False)[0]
    )


@pytest.mark.slow
def test_it_changes_nothing_of_the_run_and_an_interrupted_one_finds_its_network_again(
    teacher_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings_of(teacher_folder, pictures, tmp_path / "plain", best={}))
    train(settings_of(teacher_folder, pictures, tmp_path / "whole"))
    train(settings_of(teacher_folder, pictures, tmp_path / "parts", training={"num_steps": 4}))
    monkeypatch.setattr(own_features, "train_feature_network", pytest.fail)
    train(settings_of(teacher_folder, pictures, tmp_path / "parts"))
    weights = [
        load_generator(tmp_path / name, device="cpu").denoiser.state_dict() for name in ("plain", "whole", "parts")
    ]
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())
    whole, parts = (json.loads((tmp_path / name / "best.json").read_text()) for name in ("whole", "parts"))
    timeless = [[{**row, "seconds": 0} for row in rows] for rows in (whole, parts)]
    assert timeless[0] == timeless[1]


@pytest.mark.slow
def test_a_run_by_the_clock_is_measured_however_few_steps_it_makes(
    teacher_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    """By steps alone ten minutes of a laptop, below the first thousand, would never be measured."""
    changes: dict[str, dict[str, Any]] = {
        "training": {"num_steps": 3, "time_limit_minutes": 60},
        "run": {"checkpoint_every": 1000},
    }
    train(settings_of(teacher_folder, pictures, tmp_path / "run", **changes))
    assert [point.step for point in read_points(tmp_path / "run/best.json")] == [1]
    assert (tmp_path / "run/best/generator").is_dir()


def test_steps_or_seconds() -> None:
    due = either(every_steps(5), every_seconds(10))
    assert due(1, 0.5, None)
    assert not either(every_steps(5))(1, 0.5, None)


@pytest.mark.slow
def test_a_run_without_its_time_says_that_nothing_was_measured(
    teacher_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings_of(teacher_folder, pictures, tmp_path / "run", run={"checkpoint_every": 1000}))
    assert f"nothing was measured, no generator is in {tmp_path / 'run/best'}" in capsys.readouterr().err


@pytest.mark.slow
def test_pictures_without_classes_are_said_not_to_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loose = write_pictures(tmp_path / "loose", classes=1)
    pretrain(tiny_pretrain_settings(loose, tmp_path / "teacher", network={"label_dim": 0, "label_dropout": 0.0}))
    train(settings_of(tmp_path / "teacher", loose, tmp_path / "run"))
    assert "warning: best.files=['trained'] needs classes to tell apart: nothing is measured" in capsys.readouterr().err
    assert not (tmp_path / "run/best").exists()


def test_a_run_that_reads_no_pictures_is_refused(teacher_folder: Path, tmp_path: Path) -> None:
    without = {"gan_generator_weight": 0, "gan_discriminator_weight": 0}
    settings = settings_of(teacher_folder, Path(), tmp_path / "run", data={"images": ""}, losses=without)
    with pytest.raises(UserError, match="this run reads none: name a feature network and a reference"):
        train(settings)
    assert not (tmp_path / "run").exists()


def test_features_of_other_pictures_are_refused_before_the_run(
    teacher_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    """They were a traceback after a thousand steps."""
    SmallClassifier(3, 4, width=4).save(tmp_path / "colour")
    SmallClassifier(1, 4, width=4).save(tmp_path / "grey")
    FeatureStatistics.of(torch.rand(60, 8)).save(tmp_path / "real.npz")
    for name, told in (("colour", "features classifier were trained on"), ("grey", "gives 16 features and .* is of 8")):
        best = {"files": [str(tmp_path / name), str(tmp_path / "real.npz")]}
        with pytest.raises(UserError, match=told):
            train(settings_of(teacher_folder, pictures, tmp_path / "run", best=best))
    assert not (tmp_path / "run").exists()
