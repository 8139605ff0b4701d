"""Tools against a run going wrong: sample statistics and alarms, the best generator, a suggested GAN weight."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.features import SmallClassifier
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.models.load import load_generator
from fewstep.settings import TrainSettings
from fewstep.training import generator_job
from fewstep.training.gan_weight import suggest_gan_weight
from fewstep.training.health import LIMITS, SampleStatistics, alarms, sample_statistics
from fewstep.training.run import train
from fewstep.training.run_log import RunLog
from fewstep.training.watch import read_points
from tests.training.helpers import tiny_train_settings


def test_the_docs_say_the_limits() -> None:
    text = (Path(__file__).parents[2] / "docs/sdxl-one-gpu.md").read_text(encoding="utf-8")
    said = [
        f"{name.replace('_', ' ')} below {low:g}" + (f" or above {high:g}" if high < 9 else "")
        for name, (low, high) in LIMITS.items()
    ]
    assert ", ".join(said) in " ".join(text.split())


def test_statistics_in_closed_form() -> None:
    images = torch.zeros(2, 3, 8, 8)
    images[0, 0] = 1.0  # pure red: saturation 1; the second picture is grey
    found = sample_statistics(images)
    assert found.saturation == pytest.approx(0.5)
    assert found.contrast == pytest.approx(images[0].flatten().std().item() / 2)
    assert found.diversity == pytest.approx((1 / 3) ** 0.5)
    alike = sample_statistics(torch.rand(1, 3, 8, 8).expand(4, 3, 8, 8))
    assert alike.diversity == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="no images"):
        sample_statistics(torch.empty(0, 3, 8, 8))


@pytest.mark.parametrize(
    ("found", "named"),
    [
        (SampleStatistics(0.2, 0.5, 0.4), []),
        (SampleStatistics(0.5, 0.5, 0.4), ["saturation"]),
        (SampleStatistics(0.2, 0.9, 0.4), ["contrast"]),
        (SampleStatistics(0.2, 0.1, 0.4), ["contrast"]),
        (SampleStatistics(0.2, 0.5, 0.1), ["diversity"]),
        (SampleStatistics(0.2, 0.5, 0.4, 0.1), ["seed diversity"]),  # prompts differ, pictures of one do not
        (SampleStatistics(0.2, 0.5, 4.0), []),  # more diverse than the teacher is no fault
    ],
)
def test_alarms_name_what_left_the_teacher(found: SampleStatistics, named: list[str]) -> None:
    sentences = alarms(replace(found, seed_diversity=found.seed_diversity or 0.3), SampleStatistics(0.2, 0.5, 0.4, 0.3))
    assert [sentence.split(" of the")[0] for sentence in sentences] == named
    assert all("times the teacher's" in sentence for sentence in sentences)


def test_grey_pictures_have_no_saturation_to_alarm_about() -> None:
    assert alarms(SampleStatistics(0.0, 0.5, 0.4), SampleStatistics(0.0, 0.5, 0.4)) == []
    earlier = SampleStatistics(saturation=0.2, contrast=0.5, diversity=0.4)  # of a run that knew no seeds
    assert alarms(SampleStatistics(0.2, 0.5, 0.4, 0.3), earlier) == []


def test_a_collapse_is_logged_and_kept(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, tensorboard=False, console=Console(quiet=True))
    log.keep_reference(sample_statistics(torch.rand(8, 3, 8, 8) * 2 - 1))
    one = torch.rand(1, 3, 8, 8) * 2 - 1
    (sentence,) = log.samples(10, sample_statistics(one.expand(8, 3, 8, 8)))
    log.flush()
    assert json.loads((tmp_path / "alarms.jsonl").read_text()) == {"step": 9, "alarm": sentence}
    assert sentence.startswith("diversity of the samples is 0.00 times the teacher's")
    (line,) = [json.loads(text) for text in (tmp_path / "sample_statistics.jsonl").read_text().splitlines()]
    assert line["step"] == 9
    assert line["diversity"] == pytest.approx(0, abs=1e-6)


def test_a_run_logs_its_samples(teacher_folder: Path, pictures: Path, tmp_path: Path) -> None:
    train(tiny_train_settings(teacher_folder, pictures, tmp_path / "run", run={"sample_every": 2}))
    lines = [json.loads(text) for text in (tmp_path / "run/sample_statistics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == [0, 1, 3, 5]
    teacher = json.loads((tmp_path / "run/teacher_statistics.json").read_text())
    assert teacher["seed_diversity"] > 0
    assert all(line["seed_diversity"] > 0 for line in lines)


def test_seeds_of_one_condition_are_told_from_conditions(
    teacher_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator that draws its class and not its noise: its pictures differ, those of one class do not."""

    def one_noise(network: Any, steps: Any, condition: Any, *, seed: int, first: int) -> Tensor:
        return condition["class_labels"].argmax(1).view(-1, 1, 1, 1).float().expand(-1, *network.image_shape) / 4

    monkeypatch.setattr(generator_job, "sample_generator", one_noise)
    train(tiny_train_settings(teacher_folder, pictures, tmp_path / "run", run={"sample_every": 2}))
    rows = [json.loads(text) for text in (tmp_path / "run/sample_statistics.jsonl").read_text().splitlines()]
    assert all(row["diversity"] > 0 and row["seed_diversity"] < 1e-6 for row in rows)
    assert "seed diversity of the samples is 0.00 times" in (tmp_path / "run/alarms.jsonl").read_text()


def best_settings(
    teacher: Path, pictures: Path, folder: Path, work: Path, **changes: dict[str, object]
) -> TrainSettings:
    torch.manual_seed(0)
    network = SmallClassifier(1, 4, width=4, name="tiny")
    network.eval().save(work / "features")
    FeatureStatistics.of(SmallClassifier.load(work / "features")(torch.rand(60, 1, 16, 16) * 2 - 1)).save(
        work / "real.npz"
    )
    best = {
        "metric": "frechet_distance", "features": str(work / "features"), "reference": str(work / "real.npz"),
        "num_images": 50,
    }  # fmt: skip
    return tiny_train_settings(teacher, pictures, folder, best=best, **changes)


def test_the_best_generator_is_kept(teacher_folder: Path, pictures: Path, tmp_path: Path) -> None:
    settings = best_settings(teacher_folder, pictures, tmp_path / "run", tmp_path)
    train(settings)
    rows = json.loads((tmp_path / "run/best.json").read_text())
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert row["frechet_distance_low"] < row["frechet_distance"] < row["frechet_distance_high"]
        assert row["num_images"] == 50
    best = min(rows, key=lambda row: row["frechet_distance"])
    kept = load_generator(tmp_path / "run/best/generator", device="cpu")
    assert kept.card.made_with["num_steps"] == best["step"]


def test_an_interrupted_run_measures_the_same(teacher_folder: Path, pictures: Path, tmp_path: Path) -> None:
    train(best_settings(teacher_folder, pictures, tmp_path / "whole", tmp_path))
    train(best_settings(teacher_folder, pictures, tmp_path / "parts", tmp_path, training={"num_steps": 4}))
    train(best_settings(teacher_folder, pictures, tmp_path / "parts", tmp_path))
    parts, whole = (read_points(tmp_path / folder / "best.json") for folder in ("parts", "whole"))
    assert [(point.step, point.figures) for point in parts] == [(point.step, point.figures) for point in whole]


def test_best_needs_features_and_reference(teacher_folder: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"best\.metric='frechet_distance' needs best\.files, a feature network and an \.npz"
    ):
        tiny_train_settings(teacher_folder, pictures, tmp_path / "run", best={"metric": "frechet_distance"})
    assert not (tmp_path / "run").exists()


def test_suggested_weight_makes_the_norms_equal(teacher_folder: Path, pictures: Path, tmp_path: Path) -> None:
    settings = tiny_train_settings(teacher_folder, pictures, tmp_path / "run")
    found = suggest_gan_weight(settings, num_updates=5, console=Console(quiet=True))
    assert found.num_updates == 5
    assert found.equal_weight * found.gan_norm == pytest.approx(found.distribution_matching_norm)
    assert not (tmp_path / "run").exists()
    again = suggest_gan_weight(settings, num_updates=5, console=Console(quiet=True))
    assert again == found


def test_suggestion_needs_distribution_matching(teacher_folder: Path, pictures: Path, tmp_path: Path) -> None:
    losses = {"distribution_matching_weight": 0.0, "gan_generator_weight": 1e-2, "gan_discriminator_weight": 1e-2}
    settings = tiny_train_settings(teacher_folder, pictures, tmp_path / "run", losses=losses)
    with pytest.raises(UserError, match=r"set losses\.distribution_matching_weight"):
        suggest_gan_weight(settings)
