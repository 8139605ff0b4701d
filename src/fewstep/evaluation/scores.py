"""Figures of a run's checkpoints in one file: `fewstep evaluate --watch` writes it, `fewstep report` draws it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewstep.evaluation.asked import PLACES
from fewstep.evaluation.measurement import Measurement

SCORES = "evaluation.json"
# of a measurement: what figures must share to be compared
CONDITIONS = ("num_images", "features", "num_features", "num_reference_images", "protocol", "proxy", "dtype")

_FREE = (*PLACES, "guidance_scale", "teacher")  # of the settings: a teacher stands beside its students


@dataclass(frozen=True)
class Score:
    """One figure with all its conditions, of the weights a checkpoint had; step and seconds are NaN where nobody noted them.

    Attributes:
        weights: "raw" or "average".
        digest: the start of the weights' sha256; "" where an earlier version did not note it.
    """

    step: float
    seconds: float
    weights: str
    found: Measurement
    digest: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `parse_scores` reads it."""
        of = {"weights": self.weights, **({"weights_sha256": self.digest} if self.digest else {})}
        return {"step": int(self.step), "seconds": self.seconds, **of, **self.found.to_dict()}


def parse_scores(rows: Any) -> list[Score]:
    """The scores of a file, or the one figure that `fewstep evaluate --json` wrote.

    Raises:
        ValueError: they are something else.
    """
    try:
        return [_score(row) for row in ([rows] if isinstance(rows, dict) else rows)]
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def differences(a: Measurement, b: Measurement) -> list[tuple[str, Any, Any]]:
    """What keeps two figures from being compared: (name, that of a, that of b); what an earlier version did not note is none."""
    pairs = [(name, getattr(a, name), getattr(b, name)) for name in CONDITIONS]
    if a.settings and b.settings:
        names = dict.fromkeys([*a.settings, *b.settings])
        pairs += [(name, a.settings.get(name), b.settings.get(name)) for name in names if name not in _FREE]
    return [
        (name, own, other)
        for name, own, other in pairs
        if own != other and not (name == "dtype" and "" in (own, other))
    ]


def is_number(value: Any) -> bool:
    """Whether it can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _score(row: Mapping[str, Any]) -> Score:
    """One figure; raises ValueError and its like where a part has another kind."""
    found = Measurement.from_dict(row)
    facts = (found.num_images, found.num_features, found.num_reference_images, found.evaluations_per_image, found.seed)
    counts = [*facts, *(value.num_images for value in found.values.values())]
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        raise ValueError("a number of pictures, features, evaluations or the seed is none")
    facts_in_words = (found.model, found.features, found.protocol, found.proxy, found.dtype)
    for text in (*facts_in_words, *(one.by for one in found.values.values())):
        if not isinstance(text, str):
            raise ValueError("a name is no text")
    for low, high in (value.interval for value in found.values.values() if value.interval is not None):
        if not (is_number(low) and is_number(high)):
            raise ValueError("an interval is not one")
    if "images_per_second" not in found.values:
        raise ValueError("images_per_second is missing")
    guidance = found.settings.get("guidance_scale", 1.0)  # an AttributeError where settings are no object
    if not is_number(guidance):
        raise ValueError("guidance_scale is none")
    step, seconds = (float(row.get(name, math.nan)) for name in ("step", "seconds"))
    return Score(step, seconds, str(row.get("weights", "")), found, str(row.get("weights_sha256", "")))
