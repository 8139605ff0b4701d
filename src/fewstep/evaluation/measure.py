"""Measuring a model: pictures batch by batch, of which only features and scores are kept, and the figures they give."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from fewstep.devices import dtype_name
from fewstep.errors import UserError
from fewstep.evaluation.features import FeatureNetwork, features_of
from fewstep.evaluation.measurement import DISTANCE, Measurement, Value, known_to, mean_of
from fewstep.evaluation.metrics import (
    FeatureStatistics,
    frechet_distance,
    frechet_error,
    frechet_slope_error,
    kernel_distance,
)
from fewstep.evaluation.neighbours import neighbour_shares
from fewstep.evaluation.prompt_scores import TextMetric, TextScores
from fewstep.evaluation.sampler import Sampler, model_sampler
from fewstep.formats.pixels import to_pictures
from fewstep.models.model import Model
from fewstep.progress import Report
from fewstep.shared_work import shared_out

Rows = dict[str, Tensor]  # what is kept of pictures, by name: a row for each, in their order
Look = Callable[[int, Tensor], Rows]  # (number of the first picture, pictures (B, C, H, W) in [-1, 1])


class NotPictures(UserError):
    """A model made NaN or infinities."""


@dataclass
class Clocked:
    """Batches of pictures from a sampler, with the seconds that sampling alone took.

    Attributes:
        report: told before every batch, and once after the last.
        processes: that share the batches out, as `shared_out` has it.
        seconds: of all batches; of many processes the first one knows them when all were made.
    """

    sample: Sampler
    num_images: int
    batch_size: int
    report: Report | None = None
    processes: int = 1
    seconds: float = field(default=0.0, init=False)

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(len(self)):
            self.tell(number)
            images, seconds = self.batch(number)
            self.seconds += seconds
            yield images
        self.tell(len(self))

    def batch(self, number: int) -> tuple[Tensor, float]:
        """Pictures of one batch, and the seconds they took.

        Raises:
            NotPictures: some are of NaN or infinities, of which 8 bits would make black pixels without a word.
        """
        first, started = number * self.batch_size, time.perf_counter()
        images = self.sample(first, min(self.batch_size, self.num_images - first))
        seconds = time.perf_counter() - started
        if broken := int((~images.isfinite()).flatten(1).any(1).sum()):
            raise NotPictures(
                f"{broken} of the {len(images)} pictures from number {first} on contain NaN or infinities: the model's weights "
                "are broken, or the precision is too coarse for it; try --precision fp32"
            )
        return images, seconds

    def tell(self, number: int) -> None:
        """Report that so many batches are made."""
        if self.report is not None:
            self.report(min(number * self.batch_size, self.num_images), self.num_images)

    def seen(self, look: Look) -> Rows:
        """What a look keeps of every picture; on other processes than the first nothing.

        A batch is made and looked at by one process, whole and alone: kernels for other numbers of pictures round otherwise, and
        where a pixel crosses the border between two of 256 levels a distance moves in its third digit.
        """

        def made(number: int) -> tuple[Rows, float]:
            images, seconds = self.batch(number)
            return look(number * self.batch_size, images), seconds

        found = shared_out(made, len(self), self.processes, self.tell)
        self.tell(len(self))
        self.seconds = sum(seconds for _, seconds in found)
        return joined_rows(rows for rows, _ in found)

    @property
    def images_per_second(self) -> Value:
        """Pictures per second of sampling by all processes together, once all were made."""
        return Value(self.num_images * self.processes / max(self.seconds, 1e-9), self.num_images)


def joined_rows(parts: Iterable[Rows]) -> Rows:
    """Rows of batches, in their order, as one."""
    found: dict[str, list[Tensor]] = {}
    for rows in parts:
        for name, part in rows.items():
            found.setdefault(name, []).append(part)
    return {name: torch.cat(pieces) for name, pieces in found.items()}


def measure_sampler(
    name: str, sample: Sampler, network: FeatureNetwork, reference: FeatureStatistics, *, num_images: int,
    evaluations_per_image: int, seed: int, real_features: Tensor | None = None, batch_size: int = 250,
    device: torch.device | str = "cpu", report: Report | None = None, resamples: int = 0,
    scores: TextScores | None = None,
) -> Measurement:  # fmt: skip
    """Sample `num_images` pictures batch by batch and measure them; only features are kept in memory.

    Args:
        report: told how far it is.
        real_features, resamples: as `figure_of` has them.
        scores: of every picture and its prompt.
    """
    pictures = Clocked(sample, num_images, batch_size, report)
    rows = pictures.seen(look(network, scores, device))
    return figure_of(
        name, rows, network, reference, pictures.images_per_second, evaluations_per_image=evaluations_per_image, seed=seed,
        real_features=real_features, resamples=resamples, scores=scores,
    )  # fmt: skip


def look(network: FeatureNetwork, scores: TextScores | None = None, device: torch.device | str = "cpu") -> Look:
    """Keeps the features (B, F) of pictures, and the scores (B,) of them as 8-bit pictures."""

    def of(first: int, images: Tensor) -> Rows:
        found = {} if scores is None else scores.of(first, to_pictures(images))
        # features are kept under the value that is computed from them
        return {DISTANCE: features_of(network, images, device), **found}

    return of


def figure_of(
    name: str, rows: Rows, network: FeatureNetwork, reference: FeatureStatistics, images_per_second: Value, *,
    evaluations_per_image: int, seed: int, real_features: Tensor | None = None, resamples: int = 0,
    scores: TextScores | None = None,
) -> Measurement:  # fmt: skip
    """The figures of what was kept of pictures under `look`.

    Args:
        real_features: of real pictures, for KID, precision, recall, density and coverage, which take as many of them as there are
            generated ones, evenly spaced: the first ones of a folder may all be of one class. Each value
            says how many where neither the generated ones nor the reference's are as many.
        resamples: behind the interval of the Frechet distance (see `distance_of`); 0 for none.
    """
    features = rows[DISTANCE]
    num_images, width = features.shape
    values = {DISTANCE: distance_of(features, reference, resamples)}
    if real_features is not None:
        real = evenly(real_features, num_images)
        others = f"against {len(real):,} real pictures" * (len(real) not in (num_images, reference.num_images))
        found = {"kid": known_to(*kernel_distance(real, features), num_images)}
        found |= {share: mean_of(each) for share, each in neighbour_shares(real, features).items()}
        values |= {key: replace(value, num_images=num_images, by=others) for key, value in found.items()}
    values |= values_of(rows, scores)
    values["images_per_second"] = images_per_second
    return Measurement(name, values, num_images, network.name, width, reference.num_images, evaluations_per_image, seed)


def values_of(rows: Rows, scores: TextScores | None) -> dict[str, Value]:
    """The mean over all pictures of each text metric, by the metrics' names."""
    metrics = () if scores is None else scores.metrics
    return {metric.name: replace(mean_of(rows[metric.name]), by=metric.by) for metric in metrics}


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
    found = measure_sampler(
        name, sample, network, reference, num_images=num_images, evaluations_per_image=evaluations, seed=seed,
        real_features=real_features, batch_size=batch_size, device=model.device, report=report, resamples=resamples,
        scores=TextScores(text_metrics, prompts) if text_metrics and prompts else None,
    )  # fmt: skip
    return replace(found, dtype=dtype_name(model.denoiser.compute_dtype), settings=guidance_of(model, guidance_scale))


def guidance_of(model: Model, asked: float | None) -> dict[str, float]:
    """The guidance scale of a teacher that can be guided, under its name; None is its family's."""
    if model.is_generator or not model.card.can_be_guided:
        return {}
    return {"guidance_scale": model.default_guidance if asked is None else asked}


class RealPictures(Protocol):
    """Pictures by their rows; `data.images.ImageDataset` is one."""

    def __len__(self) -> int: ...

    def pixels(self, indices: Tensor) -> Tensor:
        """Pictures at these rows, (B, C, H, W), uint8."""

    def counted(self, first: UserError) -> UserError:
        """What is to be said where one does not decode or fit."""


def dataset_features(
    network: FeatureNetwork, dataset: RealPictures, num_images: int = 0, batch_size: int = 250,
    device: torch.device | str = "cpu", report: Report = lambda done, total: None, processes: int = 1,
) -> Tensor:  # fmt: skip
    """Features (N, F) of a data set's first `num_images` pictures (0: all).

    Args:
        report: told before every batch.
        processes: that share the batches out, as `shared_out` has it; others than the first get no features.

    Raises:
        UserError: pictures that do not decode or fit; the message counts and names them.
    """
    count = min(num_images or len(dataset), len(dataset))
    if count < 2:
        raise UserError("a reference needs at least 2 real images")
    batches = torch.arange(count).split(batch_size)

    def work(number: int) -> Tensor:
        try:
            pixels = dataset.pixels(batches[number])
        except UserError as error:
            raise dataset.counted(error) from None
        return features_of(network, pixels.float() / 127.5 - 1, device)

    found = shared_out(work, len(batches), processes, lambda number: report(number * batch_size, count))
    return torch.cat(found) if found else torch.empty(0, 0)
