"""`fewstep quickstart`: distil the bundled teacher on this machine and show the result on one page. No network."""

import json
import os
import platform
import time
import tomllib
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fewstep.errors import UserError
from fewstep.evaluation.features import load_features
from fewstep.evaluation.measure import Measurement, measure_model
from fewstep.evaluation.metrics import FeatureStatistics, frechet_distance
from fewstep.evaluation.report.class_page import Report, write_report
from fewstep.evaluation.report.parts import CurvePoint
from fewstep.formats.atomic import replaced_file
from fewstep.formats.bundled import BUNDLED, bundled_path
from fewstep.formats.pixels import save_grid, save_side_by_side
from fewstep.models.model import Generator, Teacher, load_class_generator, load_class_teacher
from fewstep.settings import TrainSettings, parse_settings
from fewstep.training.distill import DistillationJob
from fewstep.training.run import prepare_run
from fewstep.training.trainer import claim_run_folder, run_job
from fewstep.training.watch import DISTANCE, Watch, every_seconds, figures_of_samples

NAME = "fashion-mnist"
NUM_IMAGES = 5_000  # behind the final distances of teacher and generator
CURVE_IMAGES = 2_000  # behind each point of the curve
GRID_IMAGES, GRID_COLUMNS = 60, 10
SPEED_IMAGES = 64  # the teacher's speed is measured on this many


def quickstart_settings(minutes: float, folder: Path, seed: int = 0) -> TrainSettings:
    """The bundled recipe with this time limit and run folder."""
    path = bundled_path(NAME) / "recipe.toml"
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    values["data"]["images"] = str(bundled_path(NAME) / "train.parquet")
    values["training"] |= {"time_limit_minutes": minutes, "seed": seed}
    values["run"] |= {"folder": str(folder)}
    return parse_settings(TrainSettings, values, str(path))


def run_quickstart(folder: Path, *, minutes: float = 5.0, seed: int = 0, console: Console | None = None) -> Path:
    """Distil for `minutes` of training time and write `report.html` into the run folder.

    Returns:
        Path of the report.

    Raises:
        UserError: the folder holds another run, the disk is full, the time limit is not positive.
    """
    if minutes <= 0:
        raise UserError(f"--minutes {minutes:g}: the quick start needs more than 0 minutes of training")
    console = console or Console(stderr=True)
    started = time.perf_counter()
    settings = quickstart_settings(minutes, folder, seed)
    network = load_features(BUNDLED + NAME)
    reference = FeatureStatistics.load(bundled_path(NAME) / "reference_train.npz")
    settings = prepare_run(settings, folder, console)
    teacher = load_class_teacher(
        settings.teacher.path, device=settings.compute.device, precision=settings.compute.precision
    )
    console.print(
        f"Teacher: {sum(p.numel() for p in teacher.denoiser.parameters()) / 1e6:.1f} M parameters, 35 evaluations an image"
    )
    teacher_figure = _teacher_measurement(teacher)
    claim_run_folder(settings, folder)
    job = DistillationJob(settings, teacher)
    measure = figures_of_samples(job, network, reference, num_images=CURVE_IMAGES, batch_size=250)
    watch = Watch(measure, folder / "curve.json", every_seconds(max(3.0, minutes * 60 / 10)), console=console)
    console.print(f"Distilling for {minutes:g} minutes; pictures appear in {folder / 'samples'}")
    exported = run_job(job, settings, folder, watches=(watch,), console=console)
    generator = load_class_generator(exported, precision=settings.compute.precision)
    generator_figure = measure_model(generator, "generator", network, reference, num_images=NUM_IMAGES, seed=0)
    curve = [CurvePoint(point.minutes, point.figures[DISTANCE]) for point in watch.points]
    curve.append(CurvePoint(minutes, generator_figure.frechet_distance))
    report = _build_report(folder, settings, teacher, generator, teacher_figure, generator_figure, curve, reference)
    path = write_report(folder / "report.html", report)
    figures = {"teacher": teacher_figure.to_dict(), "generator": generator_figure.to_dict(), "floor": report.floor,
               "curve": [[point.minutes, point.frechet_distance] for point in curve]}  # fmt: skip
    with replaced_file(folder / "report.json") as aside:
        aside.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    _print_table(console, report)
    console.print(
        f"{(time.perf_counter() - started) / 60:.1f} minutes in all. Open [bold]{path.resolve()}[/bold]", soft_wrap=True
    )
    return path


def _teacher_measurement(teacher: Teacher) -> Measurement:
    """The shipped measurement of the teacher's quality, with its speed measured here and now."""
    shipped = json.loads((bundled_path(NAME) / "teacher_measurement.json").read_text(encoding="utf-8"))
    teacher.sample(8)  # warm-up
    begun = time.perf_counter()
    teacher.sample(SPEED_IMAGES, batch_size=SPEED_IMAGES)
    shipped["images_per_second"] = SPEED_IMAGES / (time.perf_counter() - begun)
    return Measurement(**shipped)


def _build_report(
    folder: Path, settings: TrainSettings, teacher: Teacher, generator: Generator, teacher_figure: Measurement,
    generator_figure: Measurement, curve: list[CurvePoint], reference: FeatureStatistics,
) -> Report:  # fmt: skip
    test = FeatureStatistics.load(bundled_path(NAME) / "reference_test.npz")
    minutes = settings.training.time_limit_minutes
    teacher_images = teacher.sample(GRID_IMAGES, batch_size=GRID_IMAGES)
    generator_images = generator.sample(GRID_IMAGES, batch_size=GRID_IMAGES)
    save_grid(folder / "teacher.png", teacher_images, GRID_COLUMNS)
    save_grid(folder / "generator.png", generator_images, GRID_COLUMNS)
    save_side_by_side(folder / "side_by_side.png", teacher_images, generator_images, GRID_COLUMNS)
    return Report(
        title="One step instead of 35: Fashion-MNIST, distilled on this machine",
        teacher_images=teacher_images, generator_images=generator_images, columns=GRID_COLUMNS,
        teacher=teacher_figure, generator=generator_figure, floor=frechet_distance(test, reference),
        floor_images=test.num_images, curve=curve, curve_images=CURVE_IMAGES,
        facts=[
            f"{minutes:g} minutes of training, batch {settings.training.batch_size}, generator update every "
            f"{settings.training.generator_every} steps, precision {settings.compute.precision}, seed {settings.training.seed}.",
            f"Machine: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}.",
            f"The teacher's distance was measured once on {teacher_figure.num_images} samples (seed {teacher_figure.seed}) and "
            "ships with the package; everything else on this page was measured in this run. The last point of the curve "
            f"has {generator_figure.num_images} images.",
            "Pictures: Fashion-MNIST, Zalando Research, MIT licence.",
        ],
        next_commands=[
            (f"fewstep sample {folder}/generator --num-images 100 --grid clothes.png", "make more pictures"),
            ("fewstep quickstart --minutes 30 --folder runs/quickstart-30", "the same with more patience"),
            ("fewstep pretrain recipes/my_pictures.toml data.images=MY_FOLDER", "train a teacher on your own pictures"),
            ("fewstep train recipes/my_pictures_dmd2.toml data.images=MY_FOLDER", "distil it"),
            ("fewstep train recipes/imagenet64_dmd2_gan.toml --dry-run", "what the ImageNet-64 recipe would need"),
        ],
    )  # fmt: skip


def _print_table(console: Console, report: Report) -> None:
    table = Table("", "evaluations", "images/s", "Frechet distance", title=None)
    for name, figure in (("teacher", report.teacher), ("generator", report.generator)):
        table.add_row(
            name, str(figure.evaluations_per_image), f"{figure.images_per_second:.1f}", f"{figure.frechet_distance:.3f} ({figure.num_images})"
        )  # fmt: skip
    table.add_row("real hold-out", "-", "-", f"{report.floor:.3f} ({report.floor_images})")
    console.print(table)
    ratio = report.generator.images_per_second / report.teacher.images_per_second
    console.print(f"Speed-up: {ratio:.1f}x. Features: {report.generator.features} (not the Inception FID of papers).")
