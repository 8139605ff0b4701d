"""What `quality.py` runs: sets of pictures with a recipe and a judge, and variants of a recipe by name."""

import json
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.images import load_images
from fewstep.demos import emoji, fashion_mnist
from fewstep.errors import UserError
from fewstep.evaluation.bench import Bench, load_bench
from fewstep.evaluation.measure import dataset_features
from fewstep.formats.bundled import bundled_path
from fewstep.models.load import load_teacher
from fewstep.preparation.pairs import prepare_pairs
from fewstep.progress import Stderr, working
from fewstep.settings import TrainSettings, load_settings

ROOT = Path(__file__).parents[1]
PAIRS = "PAIRS"  # stands for the folder of the set's noise-image pairs, which are made when first asked for

_ONE_STEP = {
    "generator.training_inputs": "simulated",
    "optimizer.lr": [4e-4, 1e-3],
}  # the quick start's rates until it had two
_REVERSE_KL = {
    "losses.divergence": "reverse_kl"
}  # DMD2 as published; others need a GAN that sees all levels of the scores
VARIANTS: dict[str, dict[str, Any]] = {
    "shipped": {},
    "one-step-999": {"generator.step_indices": [999], **_ONE_STEP},
    "one-step-500": {"generator.step_indices": [500], **_ONE_STEP},
    "in-turn-1e-4-4e-4": {"generator.training_inputs": "simulated", "optimizer.lr": [1e-4, 4e-4]},
    "lr-1e-4-4e-4": {"optimizer.lr": [1e-4, 4e-4]},
    "lr-5e-5-4e-4": {"optimizer.lr": [5e-5, 4e-4]},
    "lr-5e-5-1e-3": {"optimizer.lr": [5e-5, 1e-3]},
    "every-1": {"training.generator_every": 1},
    "every-5": {"training.generator_every": 5},
    "no-gan": {"losses.gan_weights": [0.0, 0.0], **_REVERSE_KL},
    "more-gan": {"losses.gan_weights": [3e-2, 1e-1]},
    "gan-alone": {"losses.distribution_matching_weight": 0.0, **_REVERSE_KL},
    "reverse-kl": _REVERSE_KL,
    "forward-kl": {"losses.divergence": "forward_kl"},
    "jeffreys": {"losses.divergence": "jeffreys"},
    "jensen-shannon": {"losses.divergence": "jensen_shannon"},
    "gan-on-clean": {"losses.gan_levels": 300, **_REVERSE_KL},
    "gan-shared": {"losses.gan_levels": "shared"},
    "taps-2": {"losses.gan_weights": [1e-2, 3e-2], "losses.gan_taps": [0.25, 0.5]},
    "taps-3": {"losses.gan_weights": [1e-2, 3e-2], "losses.gan_taps": [0.5, 0.75, 1.0]},
    "constant-rate": {"optimizer.final_lr_fraction": 1.0},
    "long-average": {"generator.ema_half_life_images": 16_000},
    "all-levels": {"losses.level_indices": [20, 980]},
    "one-step-500-regression": {
        "generator.step_indices": [500],
        **_ONE_STEP,
        "losses.regression_weight": 0.25,
        "data.pairs": PAIRS,
    },
}


@dataclass
class Contest:
    """A set with the recipe that its variants change.

    Attributes:
        always: changes of the recipe in every variant.
        judge: folder of the bench, as examples/bundle_*.py write it.
        teacher_distance: the teacher's, on as many pictures as it was measured on.
        num_images, curve_images: behind a row's distance, and behind a point of its curve.
        num_real: real pictures behind precision and recall; 0 where the set has none.
        shown: pictures behind the gauge of diversity.
        num_pairs: noise-image pairs of a variant that asks for them.
        folder: for the pairs.
    """

    name: str
    recipe: Path
    always: Mapping[str, Any]
    judge: Path
    teacher_distance: float
    folder: Path
    num_images: int = 5_000
    curve_images: int = 1_000
    num_real: int = 0
    shown: int = 40
    batch_size: int = 250
    num_pairs: int = 2_000
    _real: list[Tensor] = field(default_factory=list)

    def settings(self, changes: Mapping[str, Any]) -> TrainSettings:
        """The recipe with changes, values as JSON or as the command line writes them."""
        every = {**self.always, **changes}
        return load_settings(
            TrainSettings, self.recipe,
            [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in every.items()],
        )  # fmt: skip

    @cached_property
    def bench(self) -> Bench:
        """Judge and reference."""
        return load_bench(self.judge)

    def real_features(self) -> Tensor | None:
        """Of the recipe's pictures, for precision and recall."""
        if not self.num_real:
            return None
        if not self._real:
            settings = self.settings({})
            shape = load_teacher(settings.teacher.path, device="cpu").denoiser.image_shape
            pictures = load_images(
                settings.data, resolution=shape[-1], channels=shape[0], num_classes=0, report=lambda line: None
            )
            self._real.append(dataset_features(self.bench.classifier, pictures, self.num_real))
        return self._real[0]

    def filled(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Changes with the folder of the pairs in its place."""
        return {key: str(self._pairs()) if value == PAIRS else value for key, value in changes.items()}

    def _pairs(self) -> Path:
        settings = self.settings({})
        teacher, folder = load_teacher(settings.teacher.path), self.folder / f"{self.name}-pairs"
        with working(Stderr(), f"Making {self.num_pairs:,} noise-image pairs") as report:
            return prepare_pairs(teacher, settings.teacher.path, folder, num_pairs=self.num_pairs, report=report)


def _bundled_classes(folder: Path) -> Contest:
    facts = fashion_mnist.FACTS
    always = {"data.images": str(bundled_path("fashion-mnist/train.parquet")), "run.sample_every": 10**6}
    return Contest(
        facts.name, bundled_path(f"{facts.name}/recipe.toml"), always, bundled_path(facts.name),
        facts.shipped()[0].frechet_distance, folder, num_real=3_000,
    )  # fmt: skip


def _bundled_text(folder: Path, **changes: Any) -> Contest:
    facts = emoji.FACTS
    always = {"run.sample_every": 10**6, "training.time_limit_minutes": 0, **changes}
    return Contest(
        facts.name, bundled_path(f"{facts.name}/recipe.toml"), always, bundled_path(facts.name),
        facts.shipped()[0].frechet_distance, folder, num_images=1_000, curve_images=400, shown=16, batch_size=32,
    )  # fmt: skip


def _one_step_text(folder: Path) -> Contest:
    contest = _bundled_text(folder)
    contest.name, contest.recipe = "emoji-one-step", ROOT / "recipes/emoji_dmd2_1step.toml"
    contest.always = {"run.sample_every": 10**6, "training.time_limit_minutes": 0, "best.files": []}
    return contest


def _cifar10(folder: Path) -> Contest:
    """Of docs/cifar10.md, whose commands make what is read here; none of the pictures ships."""
    judge = ROOT / "runs/cifar10-bench"
    found = judge / "teacher_measurement.json"
    if not found.is_file():
        raise UserError(
            f"{found} is missing: make the teacher and features of docs/cifar10.md, and give {judge} features/, "
            "reference_train.npz, reference_test.npz and the teacher's figures (fewstep evaluate --json)"
        )
    distance = json.loads(found.read_text(encoding="utf-8"))["frechet_distance"]
    return Contest(
        "cifar10",
        ROOT / "recipes/cifar10_small_dmd2.toml",
        {"run.sample_every": 10**6},
        judge,
        distance,
        folder,
        num_real=3_000,
    )


SETS: dict[str, Callable[[Path], Contest]] = {
    "fashion-mnist": _bundled_classes, "emoji": _bundled_text, "emoji-one-step": _one_step_text, "cifar10": _cifar10,
}  # fmt: skip


def images_per_step(settings: TrainSettings) -> float:
    """Images that go through a network in an average step, each forward counting one whatever the network.

    The generator makes the batch (several steps: after (n - 1) / 2 simulated ones on average, if any are); on its turn teacher (twice where
    guided) and fake score judge it, and the discriminator's encoder; the fake score denoises it, and its encoder tells it from as
    many real ones. Where the GAN shares the scores' noisy images, that counts the real ones alone. Pairs are a second batch of the
    generator's turn.
    """
    losses, steps = settings.losses, len(settings.generator.step_indices)
    has_gan = losses.gan_generator_weight > 0
    turn = has_gan + (losses.regression_weight > 0)
    if losses.distribution_matching_weight:
        turn += 2 + (settings.teacher.guidance != 1)
    simulated = 0 if settings.generator.training_inputs == "noised_data" else (steps - 1) / 2
    every_step = 1 + simulated + 1 + (1 if losses.gan_levels == "shared" else 2) * has_gan
    return settings.training.batch_size * (every_step + turn / settings.training.generator_every)


def machine() -> dict[str, str]:
    """Where a row was made, instruction set and commit included."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return {
        "processor": platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(), "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }  # fmt: skip
