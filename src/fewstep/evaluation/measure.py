"""How a figure is measured: number of images, features, reference, seed; and the figure with all of that beside it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.data.images import ImageDataset
from fewstep.diffusion.samplers import heun_evaluations
from fewstep.errors import UserError
from fewstep.evaluation.features import FeatureNetwork, extract_features
from fewstep.evaluation.metrics import FeatureStatistics, frechet_distance, precision_recall
from fewstep.models.model import AnyModel, Generator, Teacher

if TYPE_CHECKING:
    from fewstep.models.text_model import TextGenerator, TextTeacher

Sampler = Callable[[int, int], Tensor]  # (first image, number) -> images (B, C, H, W) in [-1, 1]


@dataclass(frozen=True)
class Measurement:
    """One figure of quality with everything needed to repeat it.

    Attributes:
        frechet_distance: against the reference, in the named features.
        num_images: generated images behind it, labels evenly spread.
        num_reference_images: real images behind the reference (0: not recorded).
        evaluations_per_image: network evaluations.
        images_per_second: of sampling alone, on this machine.
        precision, recall: None without the reference's own features.
    """

    model: str
    frechet_distance: float
    num_images: int
    num_reference_images: int
    features: str
    evaluations_per_image: int
    seed: int
    images_per_second: float
    precision: float | None = None
    recall: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def sentence(self) -> str:
        """The figure as one line for people."""
        extra = "" if self.precision is None else f", precision {self.precision:.3f}, recall {self.recall:.3f}"
        return (
            f"{self.model}: Frechet distance {self.frechet_distance:.3f}{extra} ({self.num_images} images against "
            f"{self.num_reference_images or 'an unrecorded number of'} real ones, features {self.features}, "
            f"{self.evaluations_per_image} evaluations an image, seed {self.seed}; {self.images_per_second:.1f} images/s)"
        )


def measure_sampler(
    name: str, sample: Sampler, network: FeatureNetwork, reference: FeatureStatistics, *, num_images: int,
    evaluations_per_image: int, seed: int, real_features: Tensor | None = None, batch_size: int = 250,
    device: torch.device | str = "cpu",
) -> Measurement:  # fmt: skip
    """Sample `num_images` pictures batch by batch and measure them; only features are kept in memory."""
    spent = 0.0

    def batches() -> Iterator[Tensor]:
        nonlocal spent
        for first in range(0, num_images, batch_size):
            started = time.perf_counter()
            images = sample(first, min(batch_size, num_images - first))
            spent += time.perf_counter() - started
            yield images

    features = extract_features(network, batches(), device)
    precision, recall = precision_recall(real_features, features) if real_features is not None else (None, None)
    return Measurement(
        name, frechet_distance(FeatureStatistics.of(features), reference), num_images, reference.num_images,
        network.name, evaluations_per_image, seed, num_images / spent, precision, recall,
    )  # fmt: skip


def generator_sampler(generator: Generator, seed: int) -> Sampler:
    """Images of a seed from a generator, classes in turn."""
    return lambda first, count: generator.sample(count, seed=seed, batch_size=count, first=first)


def teacher_sampler(teacher: Teacher, seed: int, num_steps: int, guidance_scale: float = 1.0) -> Sampler:
    """Images of a seed from a teacher by the Heun sampler, classes in turn."""
    return lambda first, count: teacher.sample(
        count, seed=seed, num_steps=num_steps, guidance_scale=guidance_scale, batch_size=count, first=first
    )


def prompt_sampler(
    model: "TextTeacher | TextGenerator", prompts: list[str], seed: int, num_steps: int, guidance_scale: float
) -> Sampler:
    """Pictures of a seed from a text-to-image model, prompts in turn."""

    def sample(first: int, count: int) -> Tensor:
        texts = [prompts[number % len(prompts)] for number in range(first, first + count)]
        if model.card.step_indices:
            return model.sample(texts, seed=seed, batch_size=count, first=first)
        return model.sample(  # type: ignore[call-arg]
            texts, seed=seed, batch_size=count, first=first, num_steps=num_steps, guidance_scale=guidance_scale
        )

    return sample


def measure_model(
    model: AnyModel, name: str, network: FeatureNetwork, reference: FeatureStatistics, *,
    num_images: int, seed: int, num_steps: int = 18, guidance_scale: float = 1.0,
    real_features: Tensor | None = None, batch_size: int = 250, prompts: list[str] | None = None,
) -> Measurement:  # fmt: skip
    """Measure a generator in its own steps, or a teacher in `num_steps` steps; text-to-image models on `prompts` in turn."""
    if not isinstance(model, Generator | Teacher):
        sampler = prompt_sampler(model, prompts or [], seed, num_steps, guidance_scale)
        evaluations = len(model.card.step_indices) or num_steps
    elif isinstance(model, Generator):
        sampler, evaluations = generator_sampler(model, seed), model.evaluations()
    else:
        sampler, evaluations = teacher_sampler(model, seed, num_steps, guidance_scale), heun_evaluations(num_steps)
    return measure_sampler(
        name, sampler, network, reference, num_images=num_images, evaluations_per_image=evaluations, seed=seed,
        real_features=real_features, batch_size=batch_size, device=model.device,
    )  # fmt: skip


def dataset_features(
    network: FeatureNetwork, dataset: ImageDataset, num_images: int = 0, batch_size: int = 250,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Features (N, F) of a data set's first `num_images` pictures (0: all)."""
    count = min(num_images or len(dataset), len(dataset))
    if count < 2:
        raise UserError("a reference needs at least 2 real images")
    batches = (dataset.pixels(rows).float() / 127.5 - 1 for rows in torch.arange(count).split(batch_size))
    return extract_features(network, batches, device)
