"""Quality against training time: a `Watch` that says what it measures, and on how many pictures."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from fewstep.evaluation.bench import Bench
from fewstep.progress import lines
from fewstep.training.generator_job import GeneratorJob
from fewstep.training.watch import (
    NUM_IMAGES,
    Due,
    Point,
    Watch,
    every_seconds,
    figures_of_samples,
    judge_of,
    read_points,
)


def watch_quality(
    job: GeneratorJob, bench: Bench, path: Path, due: Due, console: Console, *, num_images: int, earlier_images: int,
    batch_size: int, keep: Callable[[int], object] | None = None,
) -> Watch:  # fmt: skip
    """Measures the generator in training on `num_images` pictures; an interrupted run goes on with as many as it had.

    Args:
        path: of the points.
        earlier_images: behind the points of a file that does not say.
        batch_size: pictures made at once.
        keep: called with the step where a point is the best so far; saves the generator.
    """
    counts = point_images(path, earlier_images) if path.is_file() else []
    num_images = counts[-1] if counts else num_images
    measure = figures_of_samples(
        job, bench.classifier, bench.reference, num_images=num_images, batch_size=batch_size,
        report=partial(lines, console, f"measuring {num_images:,} pictures"),
    )  # fmt: skip
    return Watch(measure, path, due, keep=keep, judge=judge_of(bench.classifier, bench.reference), console=console)


def while_training(limit_seconds: float, num_points: int) -> Due:
    """At the first step, evenly from there on, and at the end, once."""
    evenly = every_seconds(max(3.0, limit_seconds / num_points))

    def due(step: int, seconds: float, last: Point | None) -> bool:
        if last is not None and seconds >= limit_seconds:
            return last.seconds < limit_seconds
        return evenly(step, seconds, last)

    return due


def point_images(path: Path, earlier_images: int) -> list[int]:
    """The number of pictures behind each point of a file."""
    return [int(point.figures.get(NUM_IMAGES, earlier_images)) for point in read_points(path)]
