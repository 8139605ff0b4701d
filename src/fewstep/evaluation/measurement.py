"""The one form every figure has: named values with the pictures behind each, and everything needed to repeat them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

DISTANCE = "frechet_distance"  # the value that runs, watches and reports compare models by
JUDGE = "judge"  # features and real pictures behind it in words, in the file of a watch
NAMES = {  # every value a measurement may have, with what people call it; one that says by what it was found needs no entry
    DISTANCE: "Frechet distance", "patch_distance": "patch Frechet distance", "kid": "KID", "precision": "precision", "recall": "recall",
    "density": "density", "coverage": "coverage", "clip_score": "CLIP score",
    "lpips_diversity": "LPIPS diversity", "teacher_lpips_diversity": "its teacher's LPIPS diversity", "lpips_diversity_ratio": "ratio of both",
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
        by: what found it, where that is not the feature network; or against how many real pictures, where those are others.
    """

    value: float
    num_images: int
    interval: tuple[float, float] | None = None
    by: str = ""

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
        values: by name (`NAMES`); what was not measured is absent.
        num_images: pictures behind the distance; values of other pictures know their own number.
        features, num_features: the network that distances are computed in, and its width (0: not recorded).
        num_reference_images: real pictures behind the reference (0: not recorded).
        evaluations_per_image: network evaluations (0: real pictures).
        protocol: name of the published way it was measured in; "" for none.
        proxy: why the figure is only a proxy of that protocol; "" where it is not.
        dtype: what the model computed in, e.g. "bfloat16", which moves a figure; "" for not recorded, or real pictures.
        settings: how it was asked for, by name and JSON-able, "guidance_scale" of a teacher among them; empty for not recorded.
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
    dtype: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        nameless = [name for name, value in self.values.items() if name not in NAMES and not value.by]
        assert not nameless, f"{nameless} have no name in NAMES"

    def __getitem__(self, name: str) -> float:
        return self.values[name].value

    def get(self, name: str) -> float | None:
        """A value, or None where it was not measured."""
        return self[name] if name in self.values else None

    @property
    def frechet_distance(self) -> float:
        """Against the reference, in the named features."""
        return self[DISTANCE]

    @property
    def images_per_second(self) -> float:
        """Of sampling alone, on the machine it was measured on."""
        return self["images_per_second"]

    @property
    def way(self) -> str:
        """The protocol in which it was measured, or of which it is only a proxy; "" for none."""
        return (
            f"PROXY of {self.protocol} ({self.proxy})"
            if self.proxy
            else f"protocol {self.protocol}" * bool(self.protocol)
        )

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
        ways: dict[str, Any] = {"protocol": self.protocol, "proxy": self.proxy} if self.protocol else {}
        if self.dtype:
            ways["dtype"] = self.dtype
        if self.settings:
            ways["settings"] = dict(self.settings)
        if by := {name: value.by for name, value in self.values.items() if value.by}:
            ways["by"] = by
        cautions = {"warnings": self.cautions()} if self.cautions() else {}
        return {
            "model": self.model, **numbers, **facts, **ways, "intervals": intervals, "num_images_of": counts, **cautions
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Measurement":
        """Inverse of `to_dict`; also reads what versions before 0.2 wrote, of text-to-image models too."""
        if "held_out_distance" in values and "following" in values:
            return _from_text_form(values)
        facts = {name: values[name] for name in (*_FACTS, "protocol", "proxy", "dtype", "settings") if name in values}
        intervals, counts, by = (values.get(name, {}) for name in ("intervals", "num_images_of", "by"))
        numbers = {
            name: Value(
                float(values[name]), int(counts.get(name, facts["num_images"])),
                tuple(intervals[name]) if name in intervals else None, by.get(name, ""),
            )
            for name in {**NAMES, **by} if values.get(name) is not None
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
        figures = ", ".join(
            f"{NAMES.get(name, name.replace('_', ' '))} {value}{f' ({value.by})' * bool(value.by)}"
            for name, value in known.items()
        )
        evaluations = f"{self.evaluations_per_image} evaluation{'s' * (self.evaluations_per_image != 1)} per image"
        if "guidance_scale" in self.settings:
            evaluations += f" at guidance {self.settings['guidance_scale']:g}"
        return (
            f"{f'{self.way}: ' * bool(self.way)}{self.model}: {figures} ({self.num_images} images against "
            f"{self.num_reference_images or 'an unrecorded number of'} real ones, features {self.features}, "
            f"{evaluations}, seed {self.seed}{f', {self.dtype}' * bool(self.dtype)}; {self.images_per_second:.1f} images/s)"
        )

    def cautions(self) -> list[str]:
        """One line for each distance that rests on too few pictures, made or real, to mean anything."""
        lines = []
        for name in _DISTANCES:
            count = self.values[name].num_images if name in self.values else 0
            if 0 < count <= self.num_features:
                lines.append(
                    f"warning: {self.model}: {count} images are fewer than a {NAMES[name]} in {self.num_features} features "
                    f"needs: it is mostly the error of so few; take at least {10 * self.num_features} images, or KID"
                )
        if 0 < self.num_reference_images <= self.num_features and not self.values.keys().isdisjoint(_DISTANCES):
            lines.append(
                f"warning: {self.model}: {self.num_reference_images} real images are fewer than a Frechet distance in "
                f"{self.num_features} features needs: it compares with them alone, not with where they come from"
            )
        return lines


_DISTANCES = (DISTANCE, "patch_distance", "held_out_distance")
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


def known_to(value: float, error: float | None, num_images: int) -> Value:
    """A value with an interval of two standard errors to both sides; None: nobody knows its error."""
    return Value(value, num_images, None if error is None else (value - 2 * error, value + 2 * error))


def mean_of(each: Tensor) -> Value:
    """The mean of one number a picture, (N,), with an interval of two standard errors.

    The error is that of resampling the pictures with repetition, in closed form: the spread of such means is the spread of
    the numbers divided by the root of N.
    """
    each = each.double()
    return known_to(float(each.mean()), float(each.std(correction=0)) / len(each) ** 0.5, len(each))
