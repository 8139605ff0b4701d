"""`fewstep text-quickstart`: from the bundled text-to-image teacher to a four-step LoRA, on one page. No network."""

import json
import os
import platform
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.measure import Measurement
from fewstep.evaluation.report.parts import CurvePoint
from fewstep.evaluation.report.text_page import PromptPictures, TextReport, write_text_report
from fewstep.evaluation.text_bench import TextBench, TextMeasurement, load_text_bench
from fewstep.formats.atomic import replaced_file
from fewstep.formats.bundled import bundled_path
from fewstep.formats.pixels import save_side_by_side
from fewstep.models.model import load_generator
from fewstep.models.text_model import TextGenerator, TextTeacher
from fewstep.settings import TrainSettings, parse_settings
from fewstep.training.build import open_teacher
from fewstep.training.distill import DistillationJob
from fewstep.training.run import prepare_run
from fewstep.training.trainer import claim_run_folder, run_job
from fewstep.training.watch import DISTANCE, Watch, every_seconds, figures_of_samples

NAME, TEACHER = "emoji", "sd"
NUM_IMAGES = 1_000  # behind the generator's final distance, as behind the teacher's shipped one
CURVE_IMAGES = 400  # behind each point of the curve
CURVE_POINTS = 6
BATCH_SIZE, TIMES = 32, 4


def text_quickstart_settings(minutes: float, folder: Path, seed: int = 0) -> TrainSettings:
    """The bundled recipe with this time limit and run folder."""
    path = bundled_path(f"{NAME}/recipe.toml")
    values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    values["training"] |= {"time_limit_minutes": minutes, "seed": seed}
    values["run"] |= {"folder": str(folder)}
    return parse_settings(TrainSettings, values, str(path))


@dataclass(frozen=True)
class Shown:
    """Prompts on the page with the pictures of both models, and how fast each made them, one right after the other.

    Attributes:
        known, unseen: training and held-out prompts, one of each category.
        teacher, generator: pictures of known, then unseen, (N, 3, H, W) in [-1, 1], from the same noise.
        teacher_speed, generator_speed: pictures a second.
    """

    known: list[str]
    unseen: list[str]
    teacher: Tensor
    generator: Tensor
    teacher_speed: float
    generator_speed: float


def run_text_quickstart(
    folder: Path, *, minutes: float = 5.0, seed: int = 0, console: Console | None = None
) -> Path:  # fmt: skip
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
    settings = text_quickstart_settings(minutes, folder, seed)
    bench, shipped = load_text_bench(bundled_path(NAME)), shipped_measurement()
    settings = prepare_run(settings, folder, console)
    teacher = open_teacher(settings)
    assert isinstance(teacher, TextTeacher)
    bench.classifier.to(teacher.device)
    console.print(
        f"Teacher: {sum(p.numel() for p in teacher.denoiser.parameters()) / 1e6:.1f} M parameters, "
        f"{shipped.evaluations_per_image} guided evaluations a picture"
    )
    job = DistillationJob(settings, teacher)
    claim_run_folder(settings, folder)
    measure = figures_of_samples(job, bench.classifier, bench.reference, num_images=CURVE_IMAGES, batch_size=BATCH_SIZE)
    due = every_seconds(max(3.0, minutes * 60 / CURVE_POINTS))
    watch = Watch(measure, folder / "curve.json", due, console=console)
    console.print(f"Distilling for {minutes:g} minutes; pictures appear in {folder / 'samples'}")
    exported = run_job(job, settings, folder, watches=(watch,), console=console)
    generator = load_generator(exported, device=settings.compute.device, precision=settings.compute.precision)
    assert isinstance(generator, TextGenerator)
    figure = bench.measure(generator, "generator", num_images=NUM_IMAGES, batch_size=BATCH_SIZE)
    shown = show_both(bench, teacher, generator, shipped.evaluations_per_image, settings.teacher.guidance_scale)
    curve = [CurvePoint(point.minutes, point.figures[DISTANCE]) for point in watch.points]
    report = _build_report(folder, settings, bench, shown, figure, curve)
    path = write_text_report(folder / "report.html", report)
    spent = (time.perf_counter() - started) / 60
    figures = {
        "teacher": report.teacher.to_dict(), "generator": report.generator.to_dict(), "real": report.real.to_dict(),
        "speedup": report.speedup, "curve": [[point.minutes, point.frechet_distance] for point in curve], "minutes_in_all": spent,
    }  # fmt: skip
    with replaced_file(folder / "report.json") as aside:
        aside.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    _print_table(console, report)
    console.print(f"{spent:.1f} minutes in all. Open [bold]{path.resolve()}[/bold]", soft_wrap=True)
    return path


def shipped_measurement() -> TextMeasurement:
    """What the teacher reaches, measured when it was made."""
    return TextMeasurement.from_dict(_shipped_figures())


def shipped_on_curve() -> Measurement:
    """The teacher's distance from as many pictures as a point of the curve has: fewer pictures make it larger."""
    return Measurement(**_shipped_figures()["on_curve"])


def _shipped_figures() -> dict[str, Any]:
    return json.loads(bundled_path(f"{NAME}/teacher_measurement.json").read_text(encoding="utf-8"))[TEACHER]


def show_both(
    bench: TextBench, teacher: TextTeacher, generator: TextGenerator, num_steps: int, guidance_scale: float
) -> Shown:
    """The pictures on the page, timed; the generator's several times, for they take a moment."""
    known, unseen = bench.first_of_each_group(bench.prompts), bench.first_of_each_group(bench.held_out)
    prompts, options = known + unseen, {"num_steps": num_steps, "guidance_scale": guidance_scale}
    teacher.sample(prompts, batch_size=BATCH_SIZE, num_steps=1, guidance_scale=guidance_scale)  # warm-up
    generator.sample(prompts, batch_size=BATCH_SIZE)
    begun = time.perf_counter()
    by_teacher = teacher.sample(prompts, batch_size=BATCH_SIZE, **options)  # type: ignore[arg-type]
    between = time.perf_counter()
    made = [generator.sample(prompts, batch_size=BATCH_SIZE) for _ in range(TIMES)]
    ended = time.perf_counter()
    speeds = len(prompts) / (between - begun), TIMES * len(prompts) / (ended - between)
    return Shown(known, unseen, by_teacher, made[0], *speeds)


def _build_report(
    folder: Path, settings: TrainSettings, bench: TextBench, shown: Shown, figure: TextMeasurement,
    curve: list[CurvePoint],
) -> TextReport:  # fmt: skip
    shipped = shipped_measurement()
    assert shipped.trained is not None
    save_side_by_side(folder / "side_by_side.png", shown.teacher, shown.generator, columns=6)
    real = bench.held_out_images[[bench.held_out.index(text) for text in shown.unseen]]
    split, training = len(shown.known), settings.training
    return TextReport(
        title="Four steps instead of 50: emoji from text, distilled on this machine",
        pictures=[
            PromptPictures("Prompts the teacher was trained on", shown.known, shown.teacher[:split], shown.generator[:split]),
            PromptPictures(
                "Prompts nobody was trained on", shown.unseen, shown.teacher[split:], shown.generator[split:], real
            ),
        ],
        teacher=shipped.at_speed(shown.teacher_speed), generator=figure.at_speed(shown.generator_speed),
        real=bench.real(), curve=curve, teacher_on_curve=shipped_on_curve(),
        settings=f"{shipped.evaluations_per_image} DDIM steps at guidance {settings.teacher.guidance_scale:g}",
        facts=[
            f"{training.time_limit_minutes:g} minutes of training, batch {training.batch_size}, generator update every "
            f"{training.generator_every} steps, LoRA of rank {settings.memory.lora_rank}, precision "
            f"{settings.compute.precision}, seed {training.seed}; no real picture was read, only {len(bench.prompts)} prompts.",
            f"Machine: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}.",
            f"The teacher's quality was measured once (seed {shipped.trained.seed}) and ships with the package; its speed and "
            "everything else was measured in this run.",
            "Real pictures: Noto Emoji, Google, Apache-2.0.",
        ],
        next_commands=[
            (f'fewstep sample {folder} --prompt "red apple, food & drink" --out apple', "make a picture of your own"),
            (f"fewstep export {folder} {folder}/lora --as lora", "the LoRA for diffusers, with a model card"),
            ("fewstep text-quickstart --minutes 30 --folder runs/text-quickstart-30", "the same with more patience"),
            ("fewstep train recipes/emoji_sdxl_dmd2_4step_lora.toml", "the teacher in the shape of SDXL"),
            ("fewstep train recipes/sdxl_dmd2_4step_one_gpu.toml --dry-run", "what SDXL itself would need"),
        ],
    )  # fmt: skip


def _print_table(console: Console, report: TextReport) -> None:
    table = Table("", "evaluations", "images/s", "Frechet distance", "on held-out texts", "right category", "shuffled")
    for name, found in (("teacher", report.teacher), ("generator", report.generator), ("real hold-out", report.real)):
        table.add_row(name, *found.cells()[:-1])
    console.print(table)
    console.print(
        f"Speed-up: {report.speedup:.1f}x. Features and categories: {report.generator.following.classifier} "
        "(not the Inception FID of papers)."
    )
