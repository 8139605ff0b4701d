"""A feature network of a run's own pictures, trained by the run itself where nobody made one: `best.files = ["trained"]`."""

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from fewstep.data.images import ImageDataset
from fewstep.errors import UserError
from fewstep.evaluation.features import FeatureNetwork, load_features
from fewstep.evaluation.measure import dataset_features
from fewstep.evaluation.metrics import FeatureStatistics
from fewstep.preparation.features import train_feature_network
from fewstep.progress import lines
from fewstep.shared_work import by_the_first
from fewstep.training.generator_job import GeneratorJob

FEATURES, REFERENCE = "best_features", "best_reference.npz"  # in the run folder
_SHOWN, _REFERENCE_PICTURES = 30_000, 10_000


class EvenlySpaced:
    """So many pictures of a data set as a data set of their own, from its first to its last; all where there are no more."""

    def __init__(self, dataset: ImageDataset, count: int) -> None:
        self.dataset, self.channels, self.class_names = dataset, dataset.channels, dataset.class_names
        self.rows = torch.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=torch.float64).round().long()
        self.labels = None if dataset.labels is None else dataset.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, indices: Tensor) -> Tensor:
        """Pictures at these rows, (B, C, H, W), uint8."""
        return self.dataset.pixels(self.rows[indices])

    def counted(self, first: UserError) -> UserError:
        """What is to be said of one that cannot be used."""
        return self.dataset.counted(first)


def own_features(
    job: GeneratorJob, dataset: ImageDataset, folder: Path, console: Console
) -> tuple[FeatureNetwork, FeatureStatistics]:
    """The run's feature network and the statistics of its pictures; made once, then found again in the run folder.

    30,000 pictures are shown, whatever the set's size, and up to 10,000 are the reference. Nothing else of a run depends on it:
    torch's random state is what it was.
    """

    def make() -> None:
        if not (folder / FEATURES).exists():
            shown = EvenlySpaced(dataset, _SHOWN)
            passes = max(1, round(_SHOWN / len(shown)))
            with torch.random.fork_rng([job.device] if job.device.type == "cuda" else []):
                train_feature_network(
                    shown, folder / FEATURES, num_classes=job.teacher.denoiser.num_classes, num_passes=passes,
                    seed=job.settings.training.seed, flip=job.settings.data.flip, device=str(job.device),
                    name="trained by this run", num_stages=3 if dataset.resolution <= 32 else 4,
                    precision=_precision(job), report=lines(console, "Training a feature network of these pictures"),
                )  # fmt: skip
        if not (folder / REFERENCE).exists():
            network, real = (
                load_features(str(folder / FEATURES), job.device),
                EvenlySpaced(dataset, _REFERENCE_PICTURES),
            )
            report = lines(console, f"Features of {len(real):,} real pictures")
            FeatureStatistics.of(dataset_features(network, real, device=job.device, report=report)).save(
                folder / REFERENCE
            )

    by_the_first(make)
    return load_features(str(folder / FEATURES), job.device), FeatureStatistics.load(folder / REFERENCE)


def _precision(job: GeneratorJob) -> str:
    """The run's, where a feature network can be trained in it."""
    chosen = job.settings.compute.precision
    return chosen if chosen in ("fp32", "bf16") else "fp32"
