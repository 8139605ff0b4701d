"""Measuring while training, off its clock: the curve of a quick start and the best generator of a run are both a `Watch`.

watch = Watch(figures_of_samples(job, network, reference, num_images=2000), folder / "curve.json", every_seconds(30))
run_job(job, settings, folder, watches=(watch,))
watch.points  # [Point(step, seconds, {"frechet_distance": ...}), ...]
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fewstep.errors import UserError
from fewstep.evaluation.feature_cache import refuse_other_features
from fewstep.evaluation.features import FeatureNetwork, features_of, load_features
from fewstep.evaluation.measure import measure_sampler
from fewstep.evaluation.measurement import DISTANCE, JUDGE
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.formats.atomic import replaced_file
from fewstep.parallel import agreed
from fewstep.progress import Report, Stderr, say
from fewstep.settings import TrainSettings
from fewstep.shared_work import by_the_first
from fewstep.training.generator_job import GeneratorJob
from fewstep.training.inputs import RealImages
from fewstep.training.own_features import own_features
from fewstep.training.run_log import say_in_run

BEST = "best"
NUM_IMAGES = "num_images"
INTERVAL = ("frechet_distance_low", "frechet_distance_high")
RESAMPLES = 20  # behind an interval
TIMES = 10  # that a run with a time limit is measured in, beside its first step


@dataclass(frozen=True)
class Point:
    """What was measured after `step` steps and `seconds` of training; NaN where an earlier version did not note them.

    Attributes:
        judge: features and real pictures behind the figures, in words.
    """

    step: float
    seconds: float
    figures: Mapping[str, float]
    judge: str = ""

    @property
    def minutes(self) -> float:
        """Training time in minutes."""
        return self.seconds / 60


Measure = Callable[[], Mapping[str, float]]  # figures by name of the generator as it is now
Due = Callable[[int, float, Point | None], bool]  # (step, training seconds, last point): is it time to measure?


def every_seconds(interval: float) -> Due:
    """At the first step, then once in each interval of training time."""

    def due(step: int, seconds: float, last: Point | None) -> bool:
        return last is None or seconds >= (last.seconds // interval + 1) * interval

    return due


def every_steps(interval: int) -> Due:
    """After each `interval` steps."""

    def due(step: int, seconds: float, last: Point | None) -> bool:
        return step % interval == 0 and (last is None or last.step < step)

    return due


def either(*dues: Due) -> Due:
    """When one of these says so."""

    def due(step: int, seconds: float, last: Point | None) -> bool:
        return any(one(step, seconds, last) for one in dues)

    return due


class Watch:
    """Measures the generator whenever it is due, remembers every point, and keeps the best generator where it is told how.

    The points lie in a file, so that an interrupted run goes on comparing with them; a measurement that a kill
    interrupted is made again.

    Args:
        measure: gives the figures of the generator as it is now.
        path: JSON file of the points, one object each; files of earlier versions are read.
        due: when to measure.
        keep: called with the step where a point is the best so far; saves the generator.
        figure: name of the figure that decides, the lower the better.
        judge: features and real pictures behind the figures, in words; stands beside every point.

    Attributes:
        points: everything measured so far, in the order of training.
    """

    def __init__(
        self, measure: Measure, path: Path, due: Due, *, keep: Callable[[int], object] | None = None,
        figure: str = DISTANCE, judge: str = "", console: Console | None = None,
    ) -> None:  # fmt: skip
        self.measure, self.path, self.due, self.keep = measure, path, due, keep
        self.figure, self.judge = figure, judge
        self.console = console or Stderr()
        self.points: list[Point] = []

    def resume(self, step: int, seconds: float) -> None:
        """Take up the points of an interrupted run until `step` finished steps; measures where one is missing.

        Raises:
            UserError: the file of the points is damaged.
        """
        found = read_points(self.path) if self.path.is_file() else []
        self.points = [point for point in found if not (point.step > step or point.seconds > seconds)]
        if step:
            self(step, seconds)

    def __call__(self, step: int, seconds: float) -> None:
        """Measure after `step` finished steps and `seconds` of training, if it is due."""
        if not self.is_due(step, seconds):
            return
        figures = agreed(dict(self.measure()))
        found, earlier = figures[self.figure], self.best
        if self.keep is not None and found < earlier:
            self.keep(step)
        self.points.append(Point(step, seconds, figures, self.judge))
        by_the_first(self._write)
        told = f"{self.figure.replace('_', ' ')} {found:.3f}"
        best = f"best so far {earlier:.3f}" if found >= earlier else "the best so far" + (", kept" if self.keep else "")
        say_in_run(self.path.parent, self.console, f"step {step}, {seconds / 60:.1f} min: {told}, {best}")

    def _write(self) -> None:
        with replaced_file(self.path) as aside:
            aside.write_text(json.dumps([_row(point) for point in self.points], indent=1), encoding="utf-8")

    def is_due(self, step: int, seconds: float) -> bool:
        """Whether a call now would measure."""
        return self.due(step, seconds, self.points[-1] if self.points else None)

    @property
    def best(self) -> float:
        """The best value of the figure that decides, infinity before the first."""
        return min((point.figures[self.figure] for point in self.points), default=float("inf"))


def read_points(path: Path) -> list[Point]:
    """Points of a `Watch`'s file, or of the curve.json ([minutes, distance] each) and best.json of earlier versions.

    Raises:
        UserError: damaged.
    """
    try:
        return [_point(row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to measure from here on") from None


def judge_of(network: FeatureNetwork, reference: FeatureStatistics) -> str:
    """Features and real pictures behind a distance, in words."""
    of = f"{reference.num_images:,} real pictures" if reference.num_images else "a reference of unrecorded size"
    return f"features {network.name} ({len(reference.mean)} of them), {of}"


def _row(point: Point) -> dict[str, float | str]:
    """As it is written: without what an earlier version did not note."""
    row: dict[str, float | str] = {} if math.isnan(point.step) else {"step": int(point.step)}
    if not math.isnan(point.seconds):
        row["seconds"] = point.seconds
    return {**row, **point.figures, **({JUDGE: point.judge} if point.judge else {})}


def _point(row: Any) -> Point:
    nan = float("nan")
    if isinstance(row, list):
        minutes, distance = row
        return Point(nan, float(minutes) * 60, {DISTANCE: float(distance)})
    figures = {name: float(value) for name, value in row.items() if name not in ("step", "seconds", JUDGE)}
    if DISTANCE not in figures:
        raise ValueError(f"a point without {DISTANCE}")
    return Point(float(row.get("step", nan)), float(row.get("seconds", nan)), figures, str(row.get(JUDGE, "")))


def figures_of_samples(
    job: GeneratorJob, network: FeatureNetwork, reference: FeatureStatistics, *, num_images: int, batch_size: int = 50,
    report: Callable[[], Report | None] = lambda: None,
) -> Measure:  # fmt: skip
    """Frechet distance of `num_images` samples of the generator in training, in the features of `network`, with their number and its interval.

    Args:
        report: called before each measurement; what it gives is told how far that is.
    """

    def measure() -> Mapping[str, float]:
        found = measure_sampler(
            "generator", job.sample_images, network, reference, num_images=num_images,
            evaluations_per_image=len(job.steps), seed=1, batch_size=batch_size, device=job.device, resamples=RESAMPLES,
            report=report(),
        )  # fmt: skip
        distance = found.values[DISTANCE]
        known = dict(zip(INTERVAL, distance.interval or (), strict=False))
        return {DISTANCE: distance.value, NUM_IMAGES: found.num_images, **known}

    return measure


def watch_for_best(
    job: GeneratorJob, settings: TrainSettings, folder: Path, console: Console | None = None
) -> tuple[Watch, ...]:
    """Measures by the settings of `best.*` and keeps the best generator in `best/`; nothing where none are set.

    It measures at every `run.checkpoint_every` steps; with a time limit also at the first step and in each tenth of the time: how many
    steps such a run will have, nobody knows.

    Raises:
        UserError: features or reference cannot be read, or belong neither together nor to these pictures.
    """
    best, console = settings.best, console or Stderr()
    if not best.files:
        return ()
    measure = _in_own_features(job, folder, best.num_images, console) if best.is_trained else _in_files(job, settings)
    if measure is None:
        return ()
    due, limit = every_steps(settings.run.checkpoint_every), settings.training.time_limit_minutes * 60
    if limit:
        due = either(due, every_seconds(limit / TIMES))
    return (
        Watch(measure, folder / "best.json", due, keep=lambda step: job.save_result(folder / BEST, step), console=console),
    )  # fmt: skip


def tell_best(watches: tuple[Watch, ...], folder: Path, console: Console) -> None:
    """Say at the end of a run which generator was the best and where it lies."""
    for watch in watches:
        if not watch.points or not (folder / BEST).exists():
            say(
                console,
                f"nothing was measured, no generator is in {folder / BEST}: the run ended before run.checkpoint_every steps",
            )
            continue
        point = min(watch.points, key=lambda point: point.figures[watch.figure])
        told = f"{watch.figure.replace('_', ' ')} {point.figures[watch.figure]:.3f}"
        say(
            console,
            f"the best generator, of step {point.step:.0f} ({point.minutes:.1f} min, {told}), is in {folder / BEST}",
        )


def _in_files(job: GeneratorJob, settings: TrainSettings) -> Measure:
    """The distance in the features and to the reference that the settings name."""
    best = settings.best
    network, reference = load_features(best.features, job.device), FeatureStatistics.load(best.reference)
    channels, height, width = job.teacher.picture_shape
    found = features_of(network, torch.zeros(1, channels, height, width), job.device).shape[1]
    if found != len(reference.mean):
        raise UserError(
            f"best.files: {best.features} gives {found} features and {best.reference} is of {len(reference.mean)}: they come from different "
            "feature networks"
        )
    refuse_other_features(reference, network, f"best.files: {best.reference}")
    return figures_of_samples(job, network, reference, num_images=best.num_images)


def _in_own_features(job: GeneratorJob, folder: Path, num_images: int, console: Console) -> Measure | None:
    """The distance in features that the run trains of its own pictures, when it first measures; None, said, where nothing tells them apart.

    Raises:
        UserError: the run reads no pictures of classes.
    """
    data = getattr(job, "real_data", None)
    if not isinstance(data, RealImages):
        raise UserError(
            "best.files=['trained'] trains a feature network of a class-conditional run's pictures, and this run reads none: name a feature "
            "network and a reference"
        )
    dataset = data.batches.dataset
    if job.teacher.denoiser.num_classes < 2 or dataset.labels is None:
        say(
            console,
            "warning: best.files=['trained'] needs classes to tell apart: nothing is measured, the last generator is the result",
        )
        return None

    @cache
    def measure() -> Measure:
        network, reference = own_features(job, dataset, folder, console)
        return figures_of_samples(job, network, reference, num_images=num_images)

    return lambda: measure()()
