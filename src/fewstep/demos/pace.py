"""How fast this machine makes pictures, and so how many of them stand behind each figure of a quick start."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fewstep.evaluation.bench import Bench
from fewstep.evaluation.features import extract_features
from fewstep.evaluation.sampler import model_sampler
from fewstep.models.model import Model

MEASURING_SHARE = 0.5  # of the training time that everything beside it may take
LEAST_SECONDS = 40.0
FEWEST_POINTS = 3  # of the curve, besides the last one
_LEARNING_TO_SAMPLE = 1.25  # a LoRA and an average make the generator this much slower than its teacher's network


@dataclass(frozen=True)
class Pace:
    """What a picture costs.

    Attributes:
        evaluation: seconds of one network evaluation.
        rest: seconds of a picture's noise, text, decoding and features.
    """

    evaluation: float
    rest: float

    def seconds(self, evaluations: float) -> float:
        """Of one picture."""
        return self.rest + self.evaluation * evaluations


@dataclass(frozen=True)
class Counts:
    """Numbers of pictures.

    Attributes:
        measured: behind the generator's final figures.
        curve_points, curve_images: points while training, and behind each.
        shown: on the page, by both models.
        sampled: in each sample grid of the run.
    """

    measured: int
    curve_points: int
    curve_images: int
    shown: int
    sampled: int


def measure_pace(teacher: Model, bench: Bench, batch_size: int, prompts: Sequence[str]) -> Pace:
    """Time the teacher's network in a few steps and in more, on growing batches, for about three seconds."""
    spent, batch = {}, min(4, batch_size)
    timed_steps = (1, 4)
    _seconds(teacher, bench, batch, 1, prompts)  # warm-up
    while True:
        spent = {num_steps: _seconds(teacher, bench, batch, num_steps, prompts) for num_steps in timed_steps}
        if batch >= batch_size or sum(spent.values()) > 0.7:
            break
        batch = min(2 * batch, batch_size)
    few, more = (model_sampler(teacher, 0, prompts=prompts, num_steps=steps)[1] for steps in timed_steps)  # evaluations
    evaluation = max((spent[4] - spent[1]) / (more - few), 1e-3 * spent[4] / more)
    return Pace(evaluation / batch, max(spent[1] - few * evaluation, 0.0) / batch)


def _seconds(teacher: Model, bench: Bench, batch: int, num_steps: int, prompts: Sequence[str]) -> float:
    sample, _ = model_sampler(teacher, 0, prompts=prompts, num_steps=num_steps)
    started = time.perf_counter()
    extract_features(bench.classifier, [sample(0, batch)], teacher.device)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def choose_counts(wanted: Counts, fewest: int, pace: Pace, minutes: float, *, few_steps: int, many: float) -> Counts:
    """As many pictures as wanted, or as this machine makes while everything beside training takes half as long as it.

    Pictures of the teacher are cut first, then points of the curve, then pictures behind each.

    Args:
        wanted: what a fast machine gets.
        fewest: pictures that a distance needs in any case.
        few_steps: evaluations of a generator's picture.
        many: evaluations of a teacher's picture, guidance counted.
    """
    seconds = max(LEAST_SECONDS, MEASURING_SHARE * 60 * minutes)
    of_teacher = pace.seconds(many)
    of_generator = pace.seconds(few_steps * _LEARNING_TO_SAMPLE)
    sampled = _within(4, 0.1 * seconds / of_teacher, wanted.sampled)
    shown = _within(4, 0.2 * seconds / of_teacher, wanted.shown)
    seconds -= (sampled + shown) * of_teacher
    measured = _within(fewest, 0.55 * seconds / of_generator, wanted.measured)
    left = max(0.0, seconds - measured * of_generator) / of_generator  # pictures for the curve
    curve_points = int(min(wanted.curve_points, left // wanted.curve_images))
    curve_images = wanted.curve_images
    if curve_points < min(FEWEST_POINTS, wanted.curve_points):
        curve_points = min(FEWEST_POINTS, wanted.curve_points)
        curve_images = _within(fewest, left / curve_points, wanted.curve_images)
        curve_points = int(min(curve_points, max(1, left // curve_images)))
    return Counts(measured, curve_points, curve_images, shown, sampled)


def _within(least: int, affordable: float, most: int) -> int:
    """The affordable number, rounded down to two digits, but not below `least` or above `most`."""
    number = int(affordable)
    unit = 10 ** max(0, len(str(number)) - 2)
    return min(most, max(least, number // unit * unit))
