"""Measuring a model: pictures batch by batch, of which only features and scores are kept, and the figures they give."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from fewstep.data.images import ImageDataset
from fewstep.errors import UserError
from fewstep.evaluation.features import FeatureNetwork, extract_features
from fewstep.evaluation.measurement import Measurement, Value, known_to, mean_of
from fewstep.evaluation.metrics import (
    FeatureStatistics,
    frechet_distance,
    frechet_error,
    frechet_slope_error,
    kernel_distance,
)
from fewstep.evaluation.neighbours import neighbour_shares
from fewstep.evaluation.prompt_scores import TextMetric, TextScores
from fewstep.evaluation.protocol import Sampler, model_sampler
from fewstep.formats.pixels import to_pictures
from fewstep.models.model import Model
from fewstep.progress import Report


@dataclass
class Clocked:
    """Batches of pictures from a sampler, with the seconds that sampling alone took.

    Attributes:
        report: told after every batch, and once before the first.
    """

    sample: Sampler
    num_images: int
    batch_size: int
    report: Report | None = None
    seconds: float = field(default=0.0, init=False)

    def __iter__(self) -> Iterator[Tensor]:
        for first in range(0, self.num_images, self.batch_size):
            if self.report is not None:
                self.report(first, self.num_images)
            started = time.perf_counter()
            images = self.sample(first, min(self.batch_size, self.num_images - first))
            self.seconds += time.perf_counter() - started
            yield images
        if self.report is not None:
            self.report(self.num_images, self.num_images)

    @property
    def images_per_second(self) -> Value:
        """Pictures per second of sampling, once all were made."""
        return Value(self.num_images / max(self.seconds, 1e-9), self.num_images)


def measure_sampler(
    name: str, sample: Sampler, network: FeatureNetwork, reference: FeatureStatistics, *, num_images: int,
    evaluations_per_image: int, seed: int, real_features: Tensor | None = None, batch_size: int = 250,
    device: torch.device | str = "cpu", report: Report | None = None, resamples: int = 0,
    scores: TextScores | None = None,
) -> Measurement:  # fmt: skip
    """Sample `num_images` pictures batch by batch and measure them; only features are kept in memory.

    Args:
        real_features: of real pictures, for KID, precision, recall, density and coverage, which take as many of them as there are
            generated ones, evenly spaced: the first ones of a folder may all be of one class.
        report: told how far it is.
        resamples: behind the interval of the Frechet distance (see `distance_of`); 0 for none.
        scores: sees every picture beside its prompt.
    """
    batches = Clocked(sample, num_images, batch_size, report)
    features = extract_features(network, scored(batches, scores, to_pictures), device)
    values = {"frechet_distance": distance_of(features, reference, resamples)}
    if real_features is not None:
        real = evenly(real_features, num_images)
        values["kid"] = known_to(*kernel_distance(real, features), num_images)
        shares = neighbour_shares(real, features)
        values |= {name: replace(mean_of(each), num_images=num_images) for name, each in shares.items()}
    values |= values_of(scores)
    values["images_per_second"] = batches.images_per_second
    return Measurement(
        name, values, num_images, network.name, features.shape[1], reference.num_images, evaluations_per_image, seed
    )


def scored(
    batches: Iterable[Tensor], scores: TextScores | None, pictures: Callable[[Tensor], list[Image.Image]]
) -> Iterator[Tensor]:
    """Batches (B, C, H, W) in [-1, 1] as they are, each shown on its way to `scores` as the 8-bit pictures it is."""
    first = 0
    for images in batches:
        if scores is not None:
            scores.see(first, pictures(images))
        first += len(images)
        yield images


def values_of(scores: TextScores | None) -> dict[str, Value]:
    """The mean over all pictures that text metrics saw, by the metrics' names."""
    if scores is None:
        return {}
    by = {metric.name: metric.by for metric in scores.metrics}
    return {name: replace(mean_of(each), by=by[name]) for name, each in scores.found().items()}


def evenly(rows: Tensor, count: int) -> Tensor:
    """At most `count` rows, evenly spaced."""
    count = min(count, len(rows))
    return rows[torch.arange(count) * len(rows) // max(count, 1)]


def distance_of(features: Tensor, reference: FeatureStatistics, resamples: int = 0) -> Value:
    """Frechet distance of features (N, F) to the reference.

    Args:
        resamples: behind its error where a distance costs little, 0 for none; in wide features the error is that to first order.
    """
    found, error = frechet_distance(FeatureStatistics.of(features), reference), None
    if resamples and features.shape[1] <= 256:
        error = frechet_error(features, reference, resamples)
    elif resamples:
        error = frechet_slope_error(features, reference)
    return known_to(found, error, len(features))


def measure_model(
    model: Model, name: str, network: FeatureNetwork, reference: FeatureStatistics, *,
    num_images: int, seed: int, num_steps: int | None = None, guidance_scale: float | None = 1.0,
    real_features: Tensor | None = None, batch_size: int = 250, prompts: list[str] | None = None,
    report: Report | None = None, resamples: int = 20, text_metrics: Sequence[TextMetric] = (),
) -> Measurement:  # fmt: skip
    """Measure a generator in its own steps, or a teacher in `num_steps` (None: its default) steps, on labels or `prompts` in turn."""
    sample, evaluations = model_sampler(
        model, seed, prompts=prompts, num_steps=num_steps, guidance_scale=guidance_scale
    )
    return measure_sampler(
        name, sample, network, reference, num_images=num_images, evaluations_per_image=evaluations, seed=seed,
        real_features=real_features, batch_size=batch_size, device=model.device, report=report, resamples=resamples,
        scores=TextScores(text_metrics, prompts) if text_metrics and prompts else None,
    )  # fmt: skip


def dataset_features(
    network: FeatureNetwork, dataset: ImageDataset, num_images: int = 0, batch_size: int = 250,
    device: torch.device | str = "cpu", report: Report = lambda done, total: None,
) -> Tensor:  # fmt: skip
    """Features (N, F) of a data set's first `num_images` pictures (0: all); `report` is told before every batch."""
    count = min(num_images or len(dataset), len(dataset))
    if count < 2:
        raise UserError("a reference needs at least 2 real images")

    def batches() -> Iterator[Tensor]:
        for rows in torch.arange(count).split(batch_size):
            report(int(rows[0]), count)
            yield dataset.pixels(rows).float() / 127.5 - 1

    return extract_features(network, batches(), device)
