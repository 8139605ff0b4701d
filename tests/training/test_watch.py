"""Measuring while training: when, what is kept, and what an interrupted run finds again."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from fewstep.errors import UserError
from fewstep.training.watch import Watch, every_seconds, every_steps, read_points


class Figures:
    """A measurement that gives the next of these figures; `None` dies instead."""

    def __init__(self, *values: float | None) -> None:
        self.values = list(values)

    def __call__(self) -> dict[str, float]:
        value = self.values.pop(0)
        if value is None:
            raise KeyboardInterrupt
        return {"frechet_distance": value, "text_following": 1.0}


def silent() -> Console:
    return Console(quiet=True)


def test_every_seconds_measures_once_in_each_interval(tmp_path: Path) -> None:
    watch = Watch(Figures(5, 4, 3, 2), tmp_path / "curve.json", every_seconds(10), console=silent())
    watch.resume(0, 0.0)
    for step, seconds in enumerate((1.0, 2.0, 9.9, 10.0, 14.0, 35.0, 39.0, 40.0), start=1):
        watch(step, seconds)
    assert [(point.step, point.seconds) for point in watch.points] == [(1, 1.0), (4, 10.0), (6, 35.0), (8, 40.0)]
    assert watch.points[0].figures == {"frechet_distance": 5, "text_following": 1.0}
    assert read_points(tmp_path / "curve.json") == watch.points


def test_the_best_is_kept(tmp_path: Path) -> None:
    kept: list[int] = []
    watch = Watch(Figures(5, 7, 4, 4), tmp_path / "best.json", every_steps(2), keep=kept.append, console=silent())
    watch.resume(0, 0.0)
    for step in range(1, 9):
        watch(step, float(step))
    assert [point.step for point in watch.points] == [2, 4, 6, 8]
    assert kept == [2, 6]
    assert watch.best == 4


def test_what_comes_after_the_checkpoint_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    watch = Watch(Figures(5, 4, 3), path, every_steps(2), console=silent())
    for step in range(1, 7):
        watch(step, float(step))
    again = Watch(Figures(9), path, every_steps(2), console=silent())
    again.resume(4, 4.0)
    assert [point.figures["frechet_distance"] for point in again.points] == [5, 4]
    again(5, 5.0)
    again(6, 6.0)
    assert [point.figures["frechet_distance"] for point in read_points(path)] == [5, 4, 9]


def test_an_interrupted_measurement_is_made_again(tmp_path: Path) -> None:
    path, kept = tmp_path / "best.json", list[int]()
    watch = Watch(Figures(5, None), path, every_steps(2), keep=kept.append, console=silent())
    watch(2, 2.0)
    with pytest.raises(KeyboardInterrupt):
        watch(4, 4.0)
    again = Watch(Figures(3), path, every_steps(2), keep=kept.append, console=silent())
    again.resume(4, 4.0)
    assert [(point.step, point.figures["frechet_distance"]) for point in read_points(path)] == [(2, 5), (4, 3)]
    assert kept == [2, 4]


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    curve, best = tmp_path / "curve.json", tmp_path / "best.json"
    curve.write_text("[[0.5, 20.0], [1.0, 10.0], [9.0, 5.0]]")
    best.write_text('[{"step": 2, "frechet_distance": 7.5}, {"step": 9, "frechet_distance": 1.0}]')
    watch = Watch(Figures(8), curve, every_seconds(30), console=silent())
    watch.resume(3, 70.0)
    assert [(point.seconds, point.figures["frechet_distance"]) for point in watch.points] == [(30, 20), (60, 10)]
    watch(4, 95.0)
    assert "NaN" not in curve.read_text()
    assert json.loads(curve.read_text())[-1] == {
        "step": 4, "seconds": 95.0, "frechet_distance": 8.0, "text_following": 1.0,
    }  # fmt: skip
    watch = Watch(Figures(), best, every_steps(2), console=silent())
    watch.resume(2, 1.0)
    assert [(point.step, point.figures) for point in watch.points] == [(2, {"frechet_distance": 7.5})]


@pytest.mark.parametrize("text", ["{", "3", "[3]", '["a"]', '[{"step": 1, "frechet_distance": "x"}]'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "best.json").write_text(text)
    watch = Watch(Figures(), tmp_path / "best.json", every_steps(2), console=silent())
    with pytest.raises(UserError, match=r"best\.json is damaged \(.*\); remove it to measure from here on"):
        watch.resume(2, 2.0)


def test_a_continued_run_writes_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    whole = Watch(Figures(5.0, 4.0), path, every_steps(2), console=silent())
    for step in range(1, 5):
        whole(step, float(step))
    content = path.read_bytes()
    begun = Watch(Figures(5.0), path, every_steps(2), console=silent())
    for step in range(1, 3):
        begun(step, float(step))
    again = Watch(Figures(4.0), path, every_steps(2), console=silent())
    again.resume(2, 2.0)
    for step in range(3, 5):
        again(step, float(step))
    assert path.read_bytes() == content
