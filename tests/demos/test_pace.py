"""How many pictures a machine of a given speed makes, and the curve that an interrupted run goes on with."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from fewstep.demos.curve import point_images, watch_quality, while_training
from fewstep.demos.emoji import FACTS as EMOJI
from fewstep.demos.fashion_mnist import FACTS as FASHION
from fewstep.demos.pace import Counts, Pace, choose_counts
from fewstep.demos.runner import DemoFacts
from fewstep.evaluation.bench import Bench
from fewstep.evaluation.features import SmallClassifier
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.training.watch import Point, every_seconds, read_points


def wanted(facts: DemoFacts) -> Counts:
    return Counts(facts.measured, facts.curve_points, facts.curve_images, facts.shown, facts.sampled)


def choose(facts: DemoFacts, evaluation: float, rest: float, minutes: float = 5.0) -> tuple[Counts, float]:
    """The numbers, and the seconds that they take beside training."""
    few, many = (1, 35) if facts is FASHION else (4, 100)
    pace = Pace(evaluation, rest)
    counts = choose_counts(wanted(facts), facts.fewest, pace, minutes, few_steps=few, many=many)
    of_generator = counts.measured + counts.curve_points * counts.curve_images
    seconds = of_generator * pace.seconds(few * 1.25) + (counts.shown + counts.sampled) * pace.seconds(many)
    return counts, seconds


@pytest.mark.parametrize("facts", [FASHION, EMOJI])
def test_a_fast_machine_makes_all(facts: DemoFacts) -> None:
    assert choose(facts, 1e-5, 1e-5)[0] == wanted(facts)


@pytest.mark.parametrize("facts", [FASHION, EMOJI])
@pytest.mark.parametrize("evaluation", [0.0003, 0.001, 0.003, 0.01, 0.03])
@pytest.mark.parametrize("minutes", [1.0, 5.0, 30.0])
def test_measuring_takes_half_as_long_as_training(facts: DemoFacts, evaluation: float, minutes: float) -> None:
    counts, seconds = choose(facts, evaluation, evaluation, minutes)
    hardly_any = (counts.measured, counts.curve_points, counts.curve_images) == (facts.fewest, 1, facts.fewest)
    assert seconds <= max(40.0, minutes * 30) or hardly_any
    assert facts.fewest <= counts.measured <= facts.measured
    assert facts.fewest <= counts.curve_images <= facts.curve_images
    assert 1 <= counts.curve_points <= facts.curve_points


def test_points_of_the_curve_go_before_pictures_behind_each() -> None:
    counts, _ = choose(FASHION, 0.005, 0.0)
    assert counts.measured == FASHION.measured
    assert 3 <= counts.curve_points < FASHION.curve_points
    assert counts.curve_images == FASHION.curve_images


def test_a_slower_machine_never_makes_more() -> None:
    counts = [choose(EMOJI, 0.001 * 1.6**power, 0.001)[0] for power in range(14)]
    for faster, slower in itertools.pairwise(counts):
        assert slower.measured <= faster.measured
        assert slower.shown <= faster.shown
        assert slower.curve_points * slower.curve_images <= faster.curve_points * faster.curve_images + 400


def test_the_curve_of_an_earlier_version_is_continued(tmp_path: Path) -> None:
    """Pairs without numbers of pictures: all had the recipe's, and later points have as many."""
    path = tmp_path / "curve.json"
    path.write_text(json.dumps([[0.0, 37.8], [0.5, 5.0]]))
    assert point_images(path, 400) == [400, 400]
    path.write_text(json.dumps([{"step": 9, "seconds": 3.0, "frechet_distance": 4.0, "num_images": 300}]))
    assert point_images(path, 400) == [300]


def test_the_curve_has_the_end_of_training() -> None:
    due, points = while_training(60.0, 4), []
    for step, seconds in enumerate(range(2, 66, 2), start=1):
        if due(step, float(seconds), points[-1] if points else None):
            points.append(Point(step, float(seconds), {}))
    assert [point.seconds for point in points] == [2.0, 16.0, 30.0, 46.0, 60.0]
    assert while_training(60.0, 4)(1, 70.0, None)  # one slow step


@pytest.mark.parametrize(("rows", "expected"), [(None, 6), ([[0.5, 5.0]], 9)])
def test_points_say_how_many_pictures_they_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[list[float]] | None, expected: int
) -> None:
    """A new curve has as many as this machine has time for, a continued one as many as it began with."""
    if rows is not None:
        (tmp_path / "curve.json").write_text(json.dumps(rows))
    classifier = SmallClassifier(1, 2, width=4, num_stages=1)
    bench = Bench(classifier.eval(), FeatureStatistics(torch.zeros(4).double(), torch.eye(4).double(), 10))
    job: Any = SimpleNamespace(
        steps=[1], device="cpu", sample_images=lambda first, count: torch.rand(count, 1, 8, 8) + first / 100
    )
    curve = watch_quality(
        job, bench, tmp_path / "curve.json", every_seconds(30.0), Console(stderr=True), num_images=6, earlier_images=9,
        batch_size=4,
    )  # fmt: skip
    curve.resume(0 if rows is None else 7, 0.0 if rows is None else 40.0)
    curve(1 if rows is None else 8, 1.0 if rows is None else 61.0)
    point = json.loads((tmp_path / "curve.json").read_text())[-1]
    assert point["num_images"] == expected
    assert point["frechet_distance_low"] < point["frechet_distance"] < point["frechet_distance_high"]
    assert point["judge"].startswith(f"features {bench.classifier.name} ({len(bench.reference.mean)} of them), ")
    assert read_points(tmp_path / "curve.json")[-1].judge == point["judge"]
    assert f"measuring {expected} pictures ...\n" in capsys.readouterr().err
