"""The quick start of classes: 28x28 pictures of clothes from a teacher of 35 evaluations, in two."""

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from fewstep.data.images import load_images
from fewstep.demos import runner
from fewstep.demos.runner import DemoFacts, Result
from fewstep.evaluation.report import Picture, Pictures
from fewstep.formats.bundled import bundled_path
from fewstep.formats.pixels import Block, save_comparison, save_grid
from fewstep.settings.data import DataSettings

COLUMNS = 10  # of the grids
SHOWN_ROWS = 3  # of each model, beside real pictures


def run_quickstart(folder: Path, *, minutes: float = 5.0, seed: int = 0, console: Console | None = None) -> Path:
    """`fewstep quickstart`; returns the path of the report."""
    return runner.run_quickstart(FACTS, folder, minutes=minutes, seed=seed, console=console)


def _pictures(result: Result) -> list[Pictures]:
    shown = [
        Picture(
            f"{name}: {found.evaluations_per_image} evaluation{'s' * (found.evaluations_per_image != 1)}, "
            f"{found.images_per_second:.3g} images/s", images, min(COLUMNS, len(images)),
        )
        for name, found, images in (
            ("Teacher", result.teacher, result.shown.teacher), ("Generator", result.generator, result.shown.generator),
        )
    ]  # fmt: skip
    note = (
        "Both grids start from the same noise and labels. They need not show the same pictures: distribution matching makes the "
        "generator's distribution match, not each sample."
    )
    return [Pictures(shown, note=note)]


def _tiles(result: Result) -> list[tuple[str, str]]:
    teacher, generator = result.teacher, result.generator
    verdict = "at or below" if generator.frechet_distance <= teacher.frechet_distance else "above"
    return [
        (f"{result.speedup:.0f}x", "the teacher's images per second"),
        (f"{generator.evaluations_per_image}", f"evaluations per picture instead of {teacher.evaluations_per_image}"),
        (
            f"{generator.frechet_distance:.2f}",
            f"Frechet distance, {verdict} the teacher's {teacher.frechet_distance:.2f}",
        ),
    ]


def _save(folder: Path, result: Result) -> None:
    shown = result.shown
    columns = min(COLUMNS, len(shown.teacher))
    save_grid(folder / "teacher.png", shown.teacher, columns)
    save_grid(folder / "generator.png", shown.generator, columns)
    real, names = _real_pictures(columns)
    few = SHOWN_ROWS * columns
    made = {
        f"teacher, {result.teacher.evaluations_per_image} evaluations": shown.teacher[:few],
        f"generator, {result.generator.evaluations_per_image} evaluations": shown.generator[:few],
    }
    save_comparison(folder / "side_by_side.png", [Block(names, {"real": real} | made)])


def _real_pictures(count: int) -> tuple[Tensor, list[str]]:
    """The first real picture of each of the first classes, (count, 1, 28, 28), and the classes' names."""
    data = load_images(
        DataSettings(images=str(bundled_path("fashion-mnist/train.parquet"))), resolution=28, channels=1, num_classes=COLUMNS,
        report=lambda line: None,
    )  # fmt: skip
    assert data.labels is not None
    first = [int((data.labels == label).nonzero()[0, 0]) for label in range(count)]
    names = data.class_names or [str(label) for label in range(COLUMNS)]
    return data.pixels(torch.tensor(first)) / 127.5 - 1, names[:count]


FACTS = DemoFacts(
    name="fashion-mnist",
    title="Two steps instead of 35: Fashion-MNIST, distilled on this machine",
    measured=5_000, curve_points=10, curve_images=2_000, shown=60, sampled=60, fewest=300, batch_size=250,
    columns={"images_per_second": "images/s", "frechet_distance": "Frechet distance"},
    tiles=_tiles,
    pictures=_pictures,
    save_pictures=_save,
    notes=lambda result: [
        f"Features: {result.generator.features}, against {result.generator.num_reference_images:,} real training pictures; "
        f"seed {result.generator.seed}, {result.generator.dtype}. Real pictures: the test pictures against the same."
    ],
    facts=lambda result: ["Pictures: Fashion-MNIST, Zalando Research, MIT licence."],
    next_commands=[
        ("fewstep sample {model} --num-images 100 --grid clothes.png", "make more pictures"),
        ("fewstep quickstart --minutes 30 --folder runs/quickstart-30", "the same with more patience"),
        ("fewstep pretrain recipes/my_pictures.toml data.images=MY_FOLDER", "train a teacher on your own pictures"),
        ("fewstep train recipes/my_pictures_dmd2.toml data.images=MY_FOLDER", "distil it"),
        ("fewstep train recipes/imagenet64_dmd2_gan.toml --dry-run", "what the ImageNet-64 recipe would need"),
    ],
    data=lambda: {"images": str(bundled_path("fashion-mnist/train.parquet"))},
)  # fmt: skip
