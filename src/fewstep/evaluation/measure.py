"""The one form every figure has: named values with the pictures behind each, and everything needed to repeat them."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.data.images import ImageDataset
from fewstep.errors import UserError
from fewstep.evaluation.features import FeatureNetwork, extract_features
from fewstep.evaluation.metrics import FeatureStatistics, frechet_distance, frechet_error, kernel_distance
from fewstep.evaluation.neighbours import neighbour_shares
from fewstep.evaluation.protocol import Sampler, model_sampler
from fewstep.models.model import Model
from fewstep.progress import Report

NAMES = {  # every value a measurement may have, with what people call it
    "frechet_distance": "Frechet distance", "patch_distance": "patch Frechet distance", "kid": "KID", "precision": "precision", "recall": "recall",
    "density": "density", "coverage": "coverage",
    "held_out_distance": "Frechet distance on held-out texts", "agreement": "right category",
    "balanced": "right category, each counting the same", "shuffled": "right category with shuffled prompts",
    "retrieval": "own picture among the nearest 10", "images_per_second": "images/s",
}  # fmt: skip


@dataclass(frozen=True)
class Value:
    """One number.

    Attributes:
        num_images: pictures behind it.
        interval: (low, high) that it is known to; None where nobody computed one.
    """

    value: float
    num_images: int
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.3f}"
        half = (self.interval[1] - self.interval[0]) / 2
        digits = 3 if half >= 5e-4 or half == 0 else 6
        return f"{self.value:.{digits}f} ± {half:.{digits}f}"


@dataclass(frozen=True)
class Measurement:
    """What is known of one model, or of real pictures.

    Attributes:
        values: by the names of `NAMES`; what was not measured is absent.
        num_images: pictures behind the distance; values of other pictures know their own number.
        features, num_features: the network that distances are computed in, and its width (0: not recorded).
        num_reference_images: real pictures behind the reference (0: not recorded).
        evaluations_per_image: network evaluations (0: real pictures).
        protocol: name of the published way it was measured in; "" for none.
        proxy: why the figure is only a proxy of that protocol; "" where it is not.
    """

    model: str
    values: Mapping[str, Value]
    num_images: int
    features: str = ""
    num_features: int = 0
    num_reference_images: int = 0
    evaluations_per_image: int = 0
    seed: int = 0
    protocol: str = ""
    proxy: str = ""

    def __post_init__(self) -> None:
        assert self.values.keys() <= NAMES.keys(), f"{self.values.keys() - NAMES.keys()} have no name in NAMES"

    def __getitem__(self, name: str) -> float:
        return self.values[name].value

    def get(self, name: str) -> float | None:
        """A value, or None where it was not measured."""
        return self[name] if name in self.values else None

    @property
    def frechet_distance(self) -> float:
        """Against the reference, in the named features."""
        return self["frechet_distance"]

    @property
    def images_per_second(self) -> float:
        """Of sampling alone, on the machine it was measured on."""
        return self["images_per_second"]

    def having(self, **values: Value) -> "Measurement":
        """The same with further, or other, values."""
        return replace(self, values={**self.values, **values})

    def without(self, *names: str) -> "Measurement":
        """The same with some values left out."""
        return replace(self, values={name: value for name, value in self.values.items() if name not in names})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able and flat: every value under its name; intervals and other numbers of pictures beside them."""
        facts = {name: getattr(self, name) for name in _FACTS}
        intervals = {name: list(value.interval) for name, value in self.values.items() if value.interval is not None}
        counts = {name: value.num_images for name, value in self.values.items() if value.num_images != self.num_images}
        numbers = {name: value.value for name, value in self.values.items()}
        ways = {"protocol": self.protocol, "proxy": self.proxy} if self.protocol else {}
        return {"model": self.model, **numbers, **facts, **ways, "intervals": intervals, "num_images_of": counts}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Measurement":
        """Inverse of `to_dict`; also reads what versions before 0.2 wrote, of text-to-image models too."""
        if "held_out_distance" in values and "following" in values:
            return _from_text_form(values)
        facts = {name: values[name] for name in (*_FACTS, "protocol", "proxy") if name in values}
        intervals, counts = values.get("intervals", {}), values.get("num_images_of", {})
        numbers = {
            name: Value(
                float(values[name]), int(counts.get(name, facts["num_images"])),
                tuple(intervals[name]) if name in intervals else None,
            )
            for name in NAMES if values.get(name) is not None
        }  # fmt: skip
        return cls(values["model"], numbers, **facts)

    def cells(self, names: tuple[str, ...]) -> list[str]:
        """For tables: evaluations, then these values with the pictures behind each; "-" where there is none."""
        return [str(self.evaluations_per_image or "-"), *(self._cell(name) for name in names)]

    def _cell(self, name: str) -> str:
        if name not in self.values:
            return "-"
        value = self.values[name]
        return f"{value.value:.1f}" if name == "images_per_second" else f"{value} ({value.num_images})"

    def sentence(self) -> str:
        """The figure as one line for people."""
        known = {name: value for name, value in self.values.items() if name != "images_per_second"}
        figures = ", ".join(f"{NAMES[name]} {value}" for name, value in known.items())
        evaluations = f"{self.evaluations_per_image} evaluation{'s' * (self.evaluations_per_image != 1)} per image"
        way = ""
        if self.protocol:
            way = f"PROXY of {self.protocol} ({self.proxy}): " if self.proxy else f"protocol {self.protocol}: "
        return (
            f"{way}{self.model}: {figures} ({self.num_images} images against "
            f"{self.num_reference_images or 'an unrecorded number of'} real ones, features {self.features}, "
            f"{evaluations}, seed {self.seed}; {self.images_per_second:.1f} images/s)"
        )

    def cautions(self) -> list[str]:
        """One line for each distance that rests on too few pictures to mean anything."""
        lines = []
        for name in ("frechet_distance", "patch_distance", "held_out_distance"):
            count = self.values[name].num_images if name in self.values else 0
            if 0 < count <= self.num_features:
                lines.append(
                    f"warning: {self.model}: {count} images are fewer than a {NAMES[name]} in {self.num_features} features "
                    f"needs: it is mostly the error of so few; take at least {10 * self.num_features} images, or KID"
                )
        return lines


_FACTS = (
    "num_images", "features", "num_features", "num_reference_images", "evaluations_per_image", "seed",
)  # fmt: skip


def _from_text_form(values: Mapping[str, Any]) -> Measurement:
    """The nested form that text-to-image models' figures had: on trained texts, and on held-out ones."""
    trained, following = values["trained"], values["following"]
    count = following["num_images"]
    base = Measurement("real", {}, count, following["classifier"])
    if trained is not None:
        base = Measurement.from_dict(trained)
    numbers = {name: following[name] for name in ("agreement", "balanced", "shuffled")}
    numbers |= {"held_out_distance": values["held_out_distance"], "retrieval": values["retrieval"]}
    return base.having(**{name: Value(number, count) for name, number in numbers.items() if number is not None})


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
) -> Measurement:  # fmt: skip
    """Sample `num_images` pictures batch by batch and measure them; only features are kept in memory.

    Args:
        real_features: of real pictures, for KID, precision, recall, density and coverage, which take as many of them as there are
            generated ones, evenly spaced: the first ones of a folder may all be of one class.
        report: told how far it is.
        resamples: behind the interval of the Frechet distance; 0 for none.
    """
    batches = Clocked(sample, num_images, batch_size, report)
    features = extract_features(network, batches, device)
    values = {"frechet_distance": distance_of(features, reference, resamples)}
    if real_features is not None:
        real = evenly(real_features, num_images)
        kid, spread = kernel_distance(real, features)
        values["kid"] = Value(kid, num_images, None if spread is None else (kid - spread, kid + spread))
        shares = neighbour_shares(real, features)
        values |= {name: Value(float(share.double().mean()), num_images) for name, share in shares.items()}
    values["images_per_second"] = batches.images_per_second
    return Measurement(
        name, values, num_images, network.name, features.shape[1], reference.num_images, evaluations_per_image, seed
    )


def evenly(rows: Tensor, count: int) -> Tensor:
    """At most `count` rows, evenly spaced."""
    count = min(count, len(rows))
    return rows[torch.arange(count) * len(rows) // max(count, 1)]


def distance_of(features: Tensor, reference: FeatureStatistics, resamples: int = 0) -> Value:
    """Frechet distance of features (N, F) to the reference, with an interval of two standard errors where it costs little."""
    found = frechet_distance(FeatureStatistics.of(features), reference)
    error = frechet_error(features, reference, resamples) if resamples and features.shape[1] <= 256 else None
    return Value(found, len(features), None if error is None else (found - 2 * error, found + 2 * error))


def measure_model(
    model: Model, name: str, network: FeatureNetwork, reference: FeatureStatistics, *,
    num_images: int, seed: int, num_steps: int | None = None, guidance_scale: float | None = 1.0,
    real_features: Tensor | None = None, batch_size: int = 250, prompts: list[str] | None = None,
    report: Report | None = None, resamples: int = 20,
) -> Measurement:  # fmt: skip
    """Measure a generator in its own steps, or a teacher in `num_steps` (None: its default) steps, on labels or `prompts` in turn."""
    sample, evaluations = model_sampler(
        model, seed, prompts=prompts, num_steps=num_steps, guidance_scale=guidance_scale
    )
    return measure_sampler(
        name, sample, network, reference, num_images=num_images, evaluations_per_image=evaluations, seed=seed,
        real_features=real_features, batch_size=batch_size, device=model.device, report=report, resamples=resamples,
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
