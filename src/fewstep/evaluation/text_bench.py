"""Measuring a text-to-image model on a shipped set: distances on known and on held-out texts, and text following."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.data.prompts import load_prompts
from fewstep.errors import UserError
from fewstep.evaluation.features import SmallClassifier, extract_features
from fewstep.evaluation.measure import Measurement, measure_sampler, prompt_sampler
from fewstep.evaluation.metrics import FeatureStatistics, frechet_distance
from fewstep.evaluation.text_following import TextFollowing, group_of, measure_text_following, retrieval_recall

if TYPE_CHECKING:
    from fewstep.models.text_model import TextGenerator, TextTeacher

NEIGHBOURS = 10
TRAIN_PROMPTS, HELD_OUT, REFERENCE = "prompts_train.txt", "held_out.parquet", "reference_train.npz"


@dataclass(frozen=True)
class TextMeasurement:
    """What is known of one model, or of real pictures.

    Attributes:
        trained: on prompts the teacher was trained on; None for real pictures.
        held_out_distance: Frechet distance of one picture a held-out text to the same reference.
        following: of those pictures.
        retrieval: share of them that find the real picture of their text among the nearest 10; None for real pictures.
    """

    trained: Measurement | None
    held_out_distance: float
    following: TextFollowing
    retrieval: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TextMeasurement":
        """Inverse of `to_dict`; unknown entries are an error of the file's maker."""
        trained = values["trained"]
        return cls(
            None if trained is None else Measurement(**trained), values["held_out_distance"],
            TextFollowing(**values["following"]), values["retrieval"],
        )  # fmt: skip

    @property
    def evaluations_per_image(self) -> int:
        """Of the model."""
        assert self.trained is not None
        return self.trained.evaluations_per_image

    def cells(self) -> list[str]:
        """For tables: evaluations, images/s, the distance on training texts, that on held-out ones, following, its control, retrieval."""
        known, following = self.trained, self.following
        of_trained = ["-", "-", "-"]
        if known is not None:
            of_trained = [
                str(known.evaluations_per_image), f"{known.images_per_second:.1f}",
                f"{known.frechet_distance:.3f} ({known.num_images})",
            ]  # fmt: skip
        return [
            *of_trained, f"{self.held_out_distance:.3f} ({following.num_images})", f"{following.agreement:.3f}",
            f"{following.shuffled:.3f}", "-" if self.retrieval is None else f"{self.retrieval:.3f}",
        ]  # fmt: skip

    def at_speed(self, images_per_second: float) -> "TextMeasurement":
        """The same quality with a speed measured elsewhere."""
        assert self.trained is not None
        return replace(self, trained=replace(self.trained, images_per_second=images_per_second))


@dataclass(frozen=True)
class TextBench:
    """A set of texts with a judge.

    Attributes:
        classifier: gives features and groups.
        reference: of one real picture a training text.
        prompts: texts the teacher was trained on, in an order without meaning.
        held_out: texts it never saw.
        held_out_images: a real picture of each, (N, 3, H, W) in [-1, 1].
    """

    classifier: SmallClassifier
    reference: FeatureStatistics
    prompts: list[str]
    held_out: list[str]
    held_out_images: Tensor

    @property
    def held_out_groups(self) -> list[str]:
        """The group of every held-out text."""
        return [group_of(text) for text in self.held_out]

    def measure(
        self, model: "TextTeacher | TextGenerator", name: str, *, num_images: int, seed: int = 0, num_steps: int = 50,
        guidance_scale: float = 1.0, batch_size: int = 32,
    ) -> TextMeasurement:  # fmt: skip
        """Measure a generator in its own steps, or a teacher in `num_steps` guided ones."""
        trained = self.measure_trained(
            model, name, num_images=num_images, seed=seed, num_steps=num_steps, guidance_scale=guidance_scale,
            batch_size=batch_size,
        )  # fmt: skip
        sample = prompt_sampler(model, self.held_out, seed, num_steps, guidance_scale)
        rows = range(0, len(self.held_out), batch_size)
        images = torch.cat([sample(row, min(batch_size, len(self.held_out) - row)) for row in rows])
        return replace(self.judge(images), trained=trained)

    def measure_trained(
        self, model: "TextTeacher | TextGenerator", name: str, *, num_images: int, seed: int = 0, num_steps: int = 50,
        guidance_scale: float = 1.0, batch_size: int = 32,
    ) -> Measurement:  # fmt: skip
        """The part of `measure` on prompts that the teacher was trained on."""
        return measure_sampler(
            name, prompt_sampler(model, self.prompts, seed, num_steps, guidance_scale), self.classifier, self.reference,
            num_images=num_images, evaluations_per_image=len(model.card.step_indices) or num_steps, seed=seed,
            batch_size=batch_size, device=model.device,
        )  # fmt: skip

    def judge(self, images: Tensor) -> TextMeasurement:
        """Figures of one picture a held-out text, (N, 3, H, W) in [-1, 1], in the order of the texts."""
        made, real = (
            extract_features(self.classifier, part.split(250), _device(self.classifier))
            for part in (images, self.held_out_images)
        )
        return TextMeasurement(
            None, frechet_distance(FeatureStatistics.of(made), self.reference),
            measure_text_following(self.classifier, images.to(_device(self.classifier)), self.held_out_groups),
            retrieval_recall(made, real, NEIGHBOURS),
        )  # fmt: skip

    def real(self) -> TextMeasurement:
        """The same figures of the real held-out pictures; they find themselves, which says nothing."""
        return replace(self.judge(self.held_out_images), retrieval=None)

    def first_of_each_group(self, texts: Sequence[str]) -> list[str]:
        """The first text of every held-out group, by group: a choice nobody made by looking at pictures."""
        first: dict[str, str] = {}
        for text in texts:
            first.setdefault(group_of(text), text)
        return [first[group] for group in sorted(set(self.held_out_groups)) if group in first]


def load_text_bench(folder: Path) -> TextBench:
    """The set in a folder as examples/bundle_emoji.py writes it.

    Raises:
        UserError: a file is missing or damaged.
    """
    return TextBench(
        SmallClassifier.load(folder / "features"), FeatureStatistics.load(folder / REFERENCE),
        load_prompts(folder / TRAIN_PROMPTS), load_prompts(folder / HELD_OUT), _read_pictures(folder / HELD_OUT),
    )  # fmt: skip


def _device(classifier: SmallClassifier) -> torch.device:
    return next(classifier.parameters()).device


def _read_pictures(path: Path) -> Tensor:
    """The column `image` of a parquet file, (N, 3, H, W) in [-1, 1]."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path, columns=["image"]).column(0).to_pylist()
        pictures = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in rows]
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} holds no pictures of one size ({str(error).splitlines()[0]}); make it again"
        ) from error
    return (pixels.float() / 127.5 - 1).contiguous()
