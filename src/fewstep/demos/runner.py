"""The quick start: distil a bundled teacher on this machine and show the result on one page. No network.

What is special about a set stands in its `DemoFacts`; the two sets are fashion_mnist.py and emoji.py.
"""

import json
import os
import platform
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as ConsoleTable
from torch import Tensor

from fewstep.demos.curve import watch_quality, while_training
from fewstep.demos.pace import Counts, Pace, choose_counts, measure_pace
from fewstep.errors import UserError
from fewstep.evaluation.bench import Bench, load_bench
from fewstep.evaluation.measure import Clocked
from fewstep.evaluation.measurement import DISTANCE, Measurement, Value
from fewstep.evaluation.report import Commands, Curve, Facts, Section, Series, Table, Tiles, write_report
from fewstep.evaluation.sampler import model_sampler
from fewstep.formats.atomic import replaced_file
from fewstep.formats.bundled import bundled_path
from fewstep.formats.json_files import entry, read_json_object
from fewstep.formats.model_folder import CARD
from fewstep.models.load import load_generator
from fewstep.models.model import Model
from fewstep.progress import Report, Stderr, busy, say, working
from fewstep.settings import TrainSettings, parse_settings
from fewstep.training.build import open_teacher
from fewstep.training.distill import DistillationJob
from fewstep.training.interruption import naming_checkpoint
from fewstep.training.run import prepare_run
from fewstep.training.run_folder import claim_run_folder
from fewstep.training.trainer import run_job
from fewstep.training.watch import BEST, NUM_IMAGES, Watch

MOST_TIMES, TIMING_SECONDS = 20, 1.0  # a generator's pictures take a moment: they are made again until a second is full


@dataclass(frozen=True)
class Shown:
    """Pictures of both models from the same noise, and how fast each made them, one right after the other.

    Attributes:
        known, unseen: training and held-out prompts, one of each group; empty for a set of classes.
        teacher, generator: pictures of known, then unseen, or of all classes in turn, (N, C, H, W) in [-1, 1].
        real: a real picture of each unseen prompt.
        speeds: pictures per second of teacher and generator.
    """

    known: list[str]
    unseen: list[str]
    teacher: Tensor
    generator: Tensor
    real: Tensor
    speeds: tuple[Value, Value]


@dataclass(frozen=True)
class Result:
    """Everything a page is made of.

    Attributes:
        teacher: quality as shipped, speed as measured here.
        teacher_on_curve: the teacher's distance from about as many pictures as a point of the curve has.
        generator: of the lowest point of the curve, measured again from other noise.
        curve: the points, [minutes, distance, number of pictures].
    """

    settings: TrainSettings
    teacher: Measurement
    teacher_on_curve: Measurement
    generator: Measurement
    real: Measurement
    shown: Shown
    curve: list[list[float]]
    num_prompts: int

    @property
    def speedup(self) -> float:
        """Pictures per second of the generator over the teacher's."""
        return self.generator.images_per_second / self.teacher.images_per_second


@dataclass(frozen=True)
class DemoFacts:
    """What is special about one quick start.

    Attributes:
        name: of the bundled set: its folder holds recipe.toml and what its bench needs.
        title: of the page.
        measurement: path of the teacher's shipped figures in teacher_measurement.json; () is the whole file.
        measured, curve_points, curve_images, shown, sampled: pictures on a fast machine, as `Counts` says.
        fewest: pictures that a distance needs in any case.
        batch_size: pictures measured at once.
        columns: values of the figures' table, with their heads.
        notes: lines under the table, from the result.
        tiles: the page's first numbers.
        pictures: the page's pictures.
        facts: further lines, from the result.
        next_commands: (command, what it does); {folder} is the run's, {model} the generator's.
        data: settings of [data] that the recipe cannot know.
    """

    name: str
    title: str
    measured: int
    curve_points: int
    curve_images: int
    shown: int
    sampled: int
    fewest: int
    batch_size: int
    columns: Mapping[str, str]
    tiles: Callable[[Result], Sequence[tuple[str, str]]]
    pictures: Callable[[Result], Sequence[Section]]
    save_pictures: Callable[[Path, Result], None]
    notes: Callable[[Result], Sequence[str]]
    facts: Callable[[Result], Sequence[str]]
    next_commands: Sequence[tuple[str, str]]
    measurement: tuple[str, ...] = ()
    data: Callable[[], dict[str, str]] = field(default=dict)

    def settings(self, minutes: float, folder: Path, seed: int = 0) -> TrainSettings:
        """The bundled recipe with this time limit and run folder."""
        path = bundled_path(f"{self.name}/recipe.toml")
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        values["data"] |= self.data()
        values["training"] |= {"time_limit_minutes": minutes, "seed": seed}
        values["run"] |= {"folder": str(folder)}
        return parse_settings(TrainSettings, values, str(path))

    def shipped(self) -> tuple[Measurement, Measurement]:
        """What the teacher reached when it was made: on all pictures, and on as many as a point of the curve has."""
        path = bundled_path(f"{self.name}/teacher_measurement.json")
        values = json.loads(path.read_text(encoding="utf-8"))
        for key in self.measurement:
            values = values[key]
        whole = Measurement.from_dict(values)
        return whole, Measurement.from_dict(values["on_curve"]) if "on_curve" in values else whole


def run_quickstart(
    facts: DemoFacts, folder: Path, *, minutes: float = 5.0, seed: int = 0, console: Console | None = None
) -> Path:  # fmt: skip
    """Distil for `minutes` of training time and write `report.html` into the run folder.

    Returns:
        Path of the report.

    Raises:
        UserError: the folder holds another run, the disk is full, the time limit is not positive.
    """
    if not minutes > 0:
        raise UserError(f"--minutes {minutes:g}: the quick start needs more than 0 minutes of training")
    console = console or Stderr()
    started = time.perf_counter()
    say(console, "Loading the teacher ...")
    with naming_checkpoint(folder):
        return _run(facts, folder, minutes, seed, console, started)


def _run(facts: DemoFacts, folder: Path, minutes: float, seed: int, console: Console, started: float) -> Path:
    settings, bench = facts.settings(minutes, folder, seed), load_bench(bundled_path(facts.name))
    settings = prepare_run(settings, folder, console)
    with busy(console, "Reading the network"):
        teacher = open_teacher(settings)
    bench.classifier.to(teacher.device)
    counts = _fit_to_machine(facts, settings, teacher, bench, console)
    samples = (settings.run.sample_every, counts.sampled)
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"samples": samples})})
    job = DistillationJob(settings, teacher)
    claim_run_folder(settings, folder)
    curve = watch_quality(
        job, bench, folder / "curve.json", while_training(minutes * 60, counts.curve_points), console,
        num_images=counts.curve_images, earlier_images=facts.curve_images, batch_size=facts.batch_size,
        keep=lambda step: job.save_result(folder / BEST, step),
    )  # fmt: skip
    say(console, f"Distilling for {minutes:g} minutes; pictures appear in {folder / 'samples'}")
    exported = best_generator(folder, curve, run_job(job, settings, folder, watches=(curve,), console=console), console)
    generator = load_generator(exported, device=settings.compute.device, precision=settings.compute.precision)
    result = _measure(facts, settings, bench, teacher, generator, counts, curve, console)
    facts.save_pictures(folder, result)
    path = write_report(folder / "report.html", facts.title, _sections(facts, result, folder, exported))
    spent = (time.perf_counter() - started) / 60
    figures = {
        "teacher": result.teacher.to_dict(), "generator": result.generator.to_dict(), "real": result.real.to_dict(),
        "speedup": result.speedup, "curve": result.curve, "minutes_in_all": spent,
    }  # fmt: skip
    with replaced_file(folder / "report.json") as aside:
        aside.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    _print_table(console, facts, result)
    say(console, f"{spent:.1f} minutes in all. Open {path.resolve()}")
    return path


def best_generator(folder: Path, curve: Watch, last: Path, console: Console) -> Path:
    """Folder of the generator whose point of the curve is the lowest; `last`, the one at the end, where that was not kept."""
    kept, lowest = folder / BEST / last.name, min(curve.points, key=lambda point: point.figures[DISTANCE], default=None)
    if lowest is None or not (kept / CARD).is_file():
        return last
    made_with = entry(read_json_object(kept / CARD), "made_with", dict, kept / CARD, f"remove {folder / BEST}")
    if made_with.get("num_steps") != lowest.step:
        return last
    say(
        console,
        f"The generator after {lowest.minutes:.1f} minutes has the lowest distance of {len(curve.points)}: {kept}",
    )
    return kept


def _fit_to_machine(
    facts: DemoFacts, settings: TrainSettings, teacher: Model, bench: Bench, console: Console
) -> Counts:
    """How many pictures this machine has time for, said aloud."""
    evaluations = facts.shipped()[0].evaluations_per_image
    size = sum(parameter.numel() for parameter in teacher.denoiser.parameters()) / 1e6
    say(
        console,
        f"Teacher: {size:.1f} M parameters, {evaluations} evaluations per picture",
    )
    with busy(console, "Measuring this machine's speed"):
        pace: Pace = measure_pace(teacher, bench, facts.batch_size, bench.prompts)
    wanted = Counts(facts.measured, facts.curve_points, facts.curve_images, facts.shown, facts.sampled)
    guided = 2 if settings.teacher.guidance != 1 else 1
    few_steps = len(settings.generator.step_indices)
    counts = choose_counts(
        wanted, facts.fewest, pace, settings.training.time_limit_minutes, few_steps=few_steps, many=evaluations * guided
    )
    fewer = "" if counts == wanted else ", fewer than on a fast machine"
    say(
        console,
        f"{1 / pace.seconds(evaluations * guided):.3g} teacher pictures per second: {counts.measured:,} pictures behind the last "
        f"figures, {counts.curve_images:,} behind a point of the curve{fewer}",
    )
    return counts


def _measure(
    facts: DemoFacts, settings: TrainSettings, bench: Bench, teacher: Model, generator: Model, counts: Counts,
    curve: Watch, console: Console,
) -> Result:  # fmt: skip
    """The generator's figures and the pictures of both."""
    with working(console, f"Measuring the generator on {counts.measured:,} pictures") as report:
        figure = bench.measure(
            generator, "generator", num_images=counts.measured, batch_size=facts.batch_size, report=report
        )
    with working(console, "Making the same pictures with teacher and generator") as report:
        shown = show_both(bench, teacher, generator, counts.shown, settings.teacher.guidance, report)
    shipped, on_curve = facts.shipped()
    points = [
        [point.minutes, point.figures[DISTANCE], point.figures.get(NUM_IMAGES, facts.curve_images)]
        for point in curve.points
    ]
    return Result(
        settings, shipped.having(images_per_second=shown.speeds[0]), on_curve, figure.having(images_per_second=shown.speeds[1]),
        bench.real(), shown, points, len(bench.prompts),
    )  # fmt: skip


def show_both(
    bench: Bench, teacher: Model, generator: Model, count: int, guidance_scale: float, report: Report
) -> Shown:
    """`count` pictures of each model (of prompts: one of each group, half of them unseen), timed in the same batches."""
    each = max(1, count // 2)
    known, unseen = (bench.first_of_each_group(texts)[:each] for texts in (bench.prompts, bench.held_out))
    prompts = known + unseen
    count = len(prompts) or count
    batch = max(1, min(count, -(-count // 3)))
    made = []
    for model in (teacher, generator):
        sample, _ = model_sampler(model, 0, prompts=prompts, guidance_scale=guidance_scale)
        made.append(_timed(sample, model, count, batch, prompts, report))
    images = [part[0] for part in made]
    real = bench.held_out_images[[bench.held_out.index(text) for text in unseen]]
    return Shown(known, unseen, images[0], images[1], real, (made[0][1], made[1][1]))


def _timed(
    sample: Callable[[int, int], Tensor],
    model: Model,
    count: int,
    batch: int,
    prompts: Sequence[str],
    report: Report,
) -> tuple[Tensor, Value]:
    """The pictures, and the speed over as many rounds as fill a second; one is enough for a slow model."""
    warm_up, _ = model_sampler(model, 0, prompts=prompts, num_steps=1)
    warm_up(0, batch)
    seconds, times, images = 0.0, 0, torch.empty(0)
    while times == 0 or (seconds < TIMING_SECONDS and times < MOST_TIMES):
        clocked = Clocked(sample, count, batch, report if times == 0 else None)
        made = torch.cat(list(clocked))
        images = made if times == 0 else images
        seconds, times = seconds + clocked.seconds, times + 1
    return images, Value(times * count / max(seconds, 1e-9), times * count)


def _sections(facts: DemoFacts, result: Result, folder: Path, model: Path) -> list[Section]:
    return [
        Tiles(facts.tiles(result)), *facts.pictures(result), quality_curve(result),
        Table(
            "Figures", ["", "evaluations", *facts.columns.values()],
            [
                ["teacher", *result.teacher.cells(tuple(facts.columns))],
                ["generator", *result.generator.cells(tuple(facts.columns))],
                ["real pictures", *result.real.cells(tuple(facts.columns))],
            ],
            notes=[*facts.notes(result), NOTES],
            warnings=[line for found in (result.teacher, result.generator) for line in found.cautions()],
        ),
        Facts([*_run_facts(result), *facts.facts(result)]),
        Commands([(command.format(folder=folder, model=model), meaning) for command, meaning in facts.next_commands]),
    ]  # fmt: skip


NOTES = (
    "In brackets the pictures behind a figure; ± is two standard errors, from drawing the generated pictures again. Fewer "
    "pictures make a distance larger. This is not the Inception FID of papers; compare only within this page."
)


def quality_curve(result: Result) -> Curve:
    """The generator's distance over training time, with what it is compared with."""
    points = [(minutes, distance) for minutes, distance, _ in result.curve]
    counts = sorted({int(count) for _, _, count in result.curve})
    on_curve = result.teacher_on_curve
    marks = [("teacher", on_curve.frechet_distance)]
    if "frechet_distance" in result.real.values:
        marks.append(("real pictures", result.real.frechet_distance))
    return Curve(
        "Quality against training time", [Series("generator", points)], "minutes of training", "Frechet distance", marks,
        f"{' or '.join(f'{count:,}' for count in counts) or 'No'} pictures behind each point, {on_curve.num_images:,} behind the "
        "teacher's line. The generator of the lowest point is kept; its figures on this page are from other noise.",
    )  # fmt: skip


def _run_facts(result: Result) -> list[str]:
    settings, training = result.settings, result.settings.training
    return [
        f"{training.time_limit_minutes:g} minutes of training, batch {training.batch_size}, generator update every "
        f"{training.generator_every} steps, precision {settings.compute.precision}, seed {training.seed}.",
        f"Machine: {platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} "
        f"cores, {torch.get_num_threads()} threads, torch {torch.__version__}.",
        f"The teacher's quality was measured once on {result.teacher.num_images:,} pictures (seed {result.teacher.seed}, "
        f"{result.teacher.dtype or 'precision not recorded'}) and ships "
        "with the package; its speed and everything else was measured in this run, both speeds one after the other in batches of "
        "the same size.",
    ]  # fmt: skip


def _print_table(console: Console, facts: DemoFacts, result: Result) -> None:
    table = ConsoleTable("", "teacher", "generator", "real pictures")
    names = tuple(facts.columns)
    columns = [found.cells(names) for found in (result.teacher, result.generator, result.real)]
    for title, *cells in zip(["evaluations", *facts.columns.values()], *columns, strict=True):
        table.add_row(title, *cells)
    console.print(table)
    for line in result.generator.cautions():
        say(console, line)
    say(
        console,
        f"Speed-up: {result.speedup:.1f}x. Features: {result.generator.features} (not the Inception FID of papers).",
    )
