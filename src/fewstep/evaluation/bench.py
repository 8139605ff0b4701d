"""What a shipped set measures a model with: a judge, a reference, and for text-to-image models known and held-out texts."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.data.prompts import load_prompts
from fewstep.errors import UserError, first_line
from fewstep.evaluation.features import SmallClassifier, extract_features
from fewstep.evaluation.measure import Clocked, distance_of, measure_model
from fewstep.evaluation.measurement import DISTANCE, Measurement, Value
from fewstep.evaluation.metrics import FeatureStatistics, frechet_distance
from fewstep.evaluation.sampler import model_sampler
from fewstep.evaluation.text_following import group_of, measure_text_following, retrieval_recall
from fewstep.models.model import Model
from fewstep.progress import Report

NEIGHBOURS = 10
TRAIN_PROMPTS, HELD_OUT, REFERENCE, HOLD_OUT_REFERENCE = (
    "prompts_train.txt", "held_out.parquet", "reference_train.npz", "reference_test.npz",
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """A set with a judge.

    Attributes:
        classifier: gives features, and groups where texts name them.
        reference: of real pictures, of one picture a training text where there are texts.
        hold_out: of real pictures that no model was trained on, or None.
        prompts: texts the teacher was trained on, in an order without meaning; empty for a set of classes.
        held_out, held_out_images: texts it never saw, and a real picture of each, (N, 3, H, W) in [-1, 1].
    """

    classifier: SmallClassifier
    reference: FeatureStatistics
    hold_out: FeatureStatistics | None = None
    prompts: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    held_out_images: Tensor = field(default_factory=lambda: torch.empty(0, 3, 1, 1))

    @property
    def held_out_groups(self) -> list[str]:
        """The group of every held-out text."""
        return [group_of(text) for text in self.held_out]

    def measure(
        self, model: Model, name: str, *, num_images: int, seed: int = 0, num_steps: int | None = None,
        guidance_scale: float | None = 1.0, batch_size: int = 32, report: Report | None = None,
    ) -> Measurement:  # fmt: skip
        """Measure a generator in its own steps, or a teacher in `num_steps` guided ones."""
        in_all = num_images + len(self.held_out)

        def told(offset: int) -> Report | None:
            return None if report is None else lambda done, _: report(offset + done, in_all)

        found = measure_model(
            model, name, self.classifier, self.reference, num_images=num_images, seed=seed, num_steps=num_steps,
            guidance_scale=guidance_scale, batch_size=batch_size, prompts=self.prompts, report=told(0),
        )  # fmt: skip
        if not self.held_out:
            return found
        sample, _ = model_sampler(
            model, seed, prompts=self.held_out, num_steps=num_steps, guidance_scale=guidance_scale
        )
        images = torch.cat(list(Clocked(sample, len(self.held_out), batch_size, told(num_images))))
        return found.having(**self.judge(images))

    def judge(self, images: Tensor) -> dict[str, Value]:
        """Values of one picture a held-out text, (N, 3, H, W) in [-1, 1], in the order of the texts."""
        device = next(self.classifier.parameters()).device
        made, real = (
            extract_features(self.classifier, part.split(250), device) for part in (images, self.held_out_images)
        )
        return {
            "held_out_distance": distance_of(made, self.reference),
            **measure_text_following(self.classifier, images.to(device), self.held_out_groups),
            "retrieval": Value(retrieval_recall(made, real, NEIGHBOURS), len(images)),
        }

    def real(self) -> Measurement:
        """The same values of real pictures that no model was trained on; what they say is the best that can be reached."""
        values: dict[str, Value] = {}
        count = len(self.held_out)
        if self.hold_out is not None:
            count = self.hold_out.num_images
            values[DISTANCE] = Value(frechet_distance(self.hold_out, self.reference), count)
        found = Measurement(
            "real", values, count, self.classifier.name, len(self.reference.mean), self.reference.num_images
        )
        # held-out pictures find themselves, which says nothing
        return found.having(**self.judge(self.held_out_images)).without("retrieval") if self.held_out else found

    def first_of_each_group(self, texts: Sequence[str]) -> list[str]:
        """The first text of every held-out group, by group: a choice nobody made by looking at pictures."""
        first: dict[str, str] = {}
        for text in texts:
            first.setdefault(group_of(text), text)
        return [first[group] for group in sorted(set(self.held_out_groups)) if group in first]


def load_bench(folder: Path) -> Bench:
    """The set in a folder as examples/bundle_*.py write it.

    Raises:
        UserError: a file is missing or damaged.
    """
    classifier, reference = SmallClassifier.load(folder / "features"), FeatureStatistics.load(folder / REFERENCE)
    if not (folder / TRAIN_PROMPTS).is_file():
        return Bench(classifier, reference, FeatureStatistics.load(folder / HOLD_OUT_REFERENCE))
    return Bench(
        classifier, reference, None, load_prompts(folder / TRAIN_PROMPTS), load_prompts(folder / HELD_OUT),
        _read_pictures(folder / HELD_OUT),
    )  # fmt: skip


def _read_pictures(path: Path) -> Tensor:
    """The column `image` of a parquet file, (N, 3, H, W) in [-1, 1]."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path, columns=["image"]).column(0).to_pylist()
        pictures = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in rows]
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} does not contain pictures of one size ({first_line(error)}); make it again") from error
    return (pixels.float() / 127.5 - 1).contiguous()
