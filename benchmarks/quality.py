"""Which recipe makes the better student: variants of one, several seeds each, after equal numbers of images through the networks.

    python benchmarks/quality.py fashion-mnist shipped more-gan --seeds 3 --images 100000
    python benchmarks/quality.py fashion-mnist try --set losses.gan_weights=[0.1,0.03] --seeds 3

An image that goes through a network once counts one, whichever network and whether a gradient follows; `images_per_step` adds
them up. So rows of different machines compare, and a variant that asks for more networks gets fewer steps. Every run is a run folder
below --folder, continued where it was interrupted; its row, once measured, is kept in `benchmarks/results/quality_SET.json` with machine
and commit and not made again. At the end stands a table of all rows of this number of images, and a page with the curves.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quality_sets import SETS, VARIANTS, Contest, images_per_step, machine
from rich.console import Console

from fewstep.demos.curve import watch_quality
from fewstep.errors import UserError
from fewstep.evaluation.measure import measure_model
from fewstep.evaluation.measurement import DISTANCE
from fewstep.evaluation.report import Curve, Series, Table, write_report
from fewstep.formats.atomic import replaced_file
from fewstep.models.load import load_generator
from fewstep.progress import Stderr, working
from fewstep.training.build import open_teacher
from fewstep.training.distill import DistillationJob
from fewstep.training.health import alarms, sample_statistics
from fewstep.training.run import prepare_run
from fewstep.training.run_folder import claim_run_folder
from fewstep.training.trainer import run_job
from fewstep.training.watch import every_steps

RESULTS = Path(__file__).parent / "results"
POINTS = 5  # of a run's curve


@dataclass(frozen=True)
class Row:
    """One finished run.

    Attributes:
        changes: of the set's recipe.
        images: through the networks.
        diversity: of the generator's samples, as a ratio to the teacher's from the same noise.
        curve: [images through the networks, distance] while training, on fewer pictures than the last distance.
        minutes: of training on `machine`.
    """

    variant: str
    changes: dict[str, Any]
    seed: int
    images: int
    steps: int
    frechet_distance: float
    precision: float | None
    recall: float | None
    diversity: float
    alarms: list[str]
    num_images: int
    curve: list[list[float]]
    minutes: float
    machine: dict[str, str]


def run_variant(contest: Contest, variant: str, changes: dict[str, Any], seed: int, images: int, folder: Path) -> Row:
    """Train one variant with one seed for `images` images through the networks, and measure it."""
    console, settings = Stderr(), contest.settings({**changes, "training.seed": seed, "run.folder": str(folder)})
    each = images_per_step(settings)
    steps = max(1, round(images / each))
    settings = settings.model_copy(update={"training": settings.training.model_copy(update={"num_steps": steps})})
    settings = prepare_run(settings, folder, console)
    teacher = open_teacher(settings)
    contest.bench.classifier.to(teacher.device)
    job = DistillationJob(settings, teacher)
    claim_run_folder(settings, folder)
    curve = watch_quality(
        job, contest.bench, folder / "curve.json", every_steps(max(1, steps // POINTS)), console,
        num_images=contest.curve_images, earlier_images=contest.curve_images, batch_size=contest.batch_size,
    )  # fmt: skip
    exported = run_job(job, settings, folder, watches=(curve,), console=console)
    seconds = job_seconds(folder)
    generator = load_generator(exported, device=settings.compute.device, precision=settings.compute.precision)
    with working(console, f"Measuring {variant}, seed {seed}, on {contest.num_images:,} pictures") as report:
        found = measure_model(
            generator, "generator", contest.bench.classifier, contest.bench.reference, num_images=contest.num_images, seed=0,
            real_features=contest.real_features(), batch_size=contest.batch_size, prompts=contest.bench.prompts, report=report,
        )  # fmt: skip
    pictures = [sample_statistics(model.sample(
        contest.bench.prompts[:contest.shown] or None, num_images=contest.shown, seed=0, output="tensor", progress=False,
    )) for model in (generator, teacher)]  # fmt: skip
    return Row(
        variant, changes, seed, images, steps, found.frechet_distance, found.get("precision"), found.get("recall"),
        pictures[0].diversity / max(pictures[1].diversity, 1e-9), alarms(*pictures), contest.num_images,
        [[point.step * each, point.figures[DISTANCE]] for point in curve.points], seconds / 60, machine(),
    )  # fmt: skip


def job_seconds(folder: Path) -> float:
    """Training time of a finished run, by its last metric line."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max((float(json.loads(line).get("seconds", 0.0)) for line in lines), default=0.0)


def read_rows(path: Path) -> list[Row]:
    """Rows of earlier calls."""
    return [Row(**values) for values in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """All rows, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as aside:
        aside.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


COLUMNS = ("variant", "seeds", "steps", "distance", "lowest point", "precision", "recall", "diversity", "alarms")


def table(rows: Sequence[Row]) -> list[list[str]]:
    """One line a variant, the best first: means over seeds and, with two seeds or more, ± the standard deviation."""
    lines = []
    for variant in dict.fromkeys(row.variant for row in rows):
        own = [row for row in rows if row.variant == variant]
        lowest = [min((distance for _, distance in row.curve), default=None) for row in own]
        figures = [spread([getattr(row, name) for row in own]) for name in
                   ("frechet_distance", "precision", "recall", "diversity")]  # fmt: skip
        figures.insert(1, spread(lowest))
        told = sum(bool(row.alarms) for row in own)
        mean = statistics.fmean(row.frechet_distance for row in own)
        lines.append(
            (mean, [variant, str(len(own)), f"{own[0].steps:,}", *figures, f"{told} of {len(own)}" if told else "none"])
        )
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])]


def as_markdown(rows: Sequence[Row]) -> str:
    """The table as it is printed, and as docs/quality.md has it."""
    lines = (COLUMNS, ["---"] * len(COLUMNS), *table(rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation over seeds."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.3f}"
    return f"{mean} ± {statistics.stdev(known):.3f}" if len(known) > 1 else mean


def write_page(path: Path, contest: Contest, rows: Sequence[Row]) -> None:
    """The table and every variant's curve, mean over its seeds."""
    series = []
    for variant in dict.fromkeys(row.variant for row in rows):
        curves = [row.curve for row in rows if row.variant == variant]
        shared = min(len(curve) for curve in curves)
        points = [
            (curves[0][number][0], statistics.fmean(curve[number][1] for curve in curves)) for number in range(shared)
        ]
        series.append(Series(variant, points))
    note = f"{contest.curve_images:,} pictures behind each point, mean over seeds; {rows[0].num_images:,} behind the table's distances."
    write_report(path, f"Variants of the {contest.name} recipe", [
        Curve("Distance against images through the networks", series, "images through the networks", "Frechet distance",
              [("teacher", contest.teacher_distance)], note),
        Table("Variants", list(COLUMNS), table(rows), notes=[
            "± is the standard deviation over seeds. Lowest point: of the curve, on fewer pictures, which makes a distance larger.",
        ]),
    ])  # fmt: skip


def main(words: Sequence[str] | None = None) -> list[Row]:
    """As the module says; returns the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contest", metavar="SET", choices=sorted(SETS), help=", ".join(sorted(SETS)))
    parser.add_argument(
        "variants", nargs="*", help=f"of {', '.join(VARIANTS)}, or a new name with --set; none: the table alone"
    )
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="a change of the recipe"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=100_000, help="through the networks")
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    contest, path = SETS[options.contest](options.folder), options.results / f"quality_{options.contest}.json"
    rows = read_rows(path)
    for variant in options.variants:
        changes = variant_changes(variant, options.changes, contest)
        for seed in range(options.seeds):
            if any((row.variant, row.seed, row.images) == (variant, seed, options.images) for row in rows):
                continue
            started, folder = (
                time.perf_counter(),
                options.folder / f"{options.contest}-{variant}-{options.images}-{seed}",
            )
            row = run_variant(contest, variant, changes, seed, options.images, folder)
            rows = [*read_rows(path), row]
            write_rows(path, rows)
            Console(stderr=True).print(
                f"{variant}, seed {seed}: {row.frechet_distance:.3f} after {row.steps} steps ({time.perf_counter() - started:.0f} s)",
                highlight=False,
            )
    shown = [row for row in rows if row.images == options.images]
    if not shown:
        raise UserError(f"{path} has no row of {options.images:,} images; name a variant: {', '.join(VARIANTS)}")
    print(
        f"{contest.name}, {options.images:,} images through the networks; the teacher's distance is {contest.teacher_distance:.3f}\n"
    )
    print(as_markdown(shown))
    options.folder.mkdir(parents=True, exist_ok=True)
    write_page(options.folder / f"{options.contest}-{options.images}.html", contest, shown)
    return shown


def variant_changes(variant: str, words: Sequence[str], contest: Contest) -> dict[str, Any]:
    """A known variant's changes, or those of the command line under a name of their own."""
    given = dict(word.split("=", 1) for word in words)
    if variant in VARIANTS and given:
        raise UserError(f"{variant} is a known variant; give the changes of --set a name of their own")
    if variant not in VARIANTS and not given:
        raise UserError(f"{variant} is no known variant ({', '.join(VARIANTS)}); --set says what it changes")
    return contest.filled(VARIANTS.get(variant, given))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"quality.py: {error}")
