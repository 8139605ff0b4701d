"""What both quick starts share."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fewstep.demos.runner import best_generator
from fewstep.evaluation.measurement import DISTANCE
from fewstep.formats.model_folder import CARD, ModelCard
from fewstep.progress import Stderr
from fewstep.training.watch import Point, Watch


def curve(*distances: float) -> Watch:
    """Points ten steps apart."""
    points = [Point(10.0 * number, 60.0 * number, {DISTANCE: value}) for number, value in enumerate(distances)]
    return cast(Watch, SimpleNamespace(points=points))


def kept(folder: Path, made_with: dict[str, Any]) -> Path:
    """The card of a generator in `best/`."""
    path = folder / "best/generator"
    path.mkdir(parents=True)
    (path / CARD).write_text(json.dumps(asdict(ModelCard("generator", (650, 400), made_with=made_with))))
    return path


def test_the_generator_of_the_lowest_point_is_taken(tmp_path: Path) -> None:
    best = kept(tmp_path, {"num_steps": 10})
    assert best_generator(tmp_path, curve(3.0, 1.0, 2.0), tmp_path / "generator", Stderr()) == best


@pytest.mark.parametrize("made_with", [{"num_steps": 20}, {}])
def test_a_generator_of_another_point_is_not(tmp_path: Path, made_with: dict[str, Any]) -> None:
    """A run that was stopped between measuring and keeping, or a folder that something else put there."""
    kept(tmp_path, made_with)
    last = tmp_path / "generator"
    assert best_generator(tmp_path, curve(3.0, 1.0, 2.0), last, Stderr()) == last
    assert best_generator(tmp_path, curve(), last, Stderr()) == last


def test_nothing_kept_is_the_last(tmp_path: Path) -> None:
    assert best_generator(tmp_path, curve(3.0, 1.0), tmp_path / "generator", Stderr()) == tmp_path / "generator"
