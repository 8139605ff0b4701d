"""The page of any run folder, or of several beside each other: losses, sample history, measured figures, settings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.report.page import write_report
from fewstep.evaluation.report.sections import Curve, Facts, Picture, Pictures, Section, Series, Table, Tiles
from fewstep.formats.json_files import read_json_object

MOST_POINTS = 200  # of a line: more are averaged
MOST_PICTURES = 6  # of a run's sample history
_NO_LOSSES = ("step", "seconds", "images_per_second", "peak_memory_gib", "data_wait_share")


@dataclass(frozen=True)
class Run:
    """What a run folder says of itself.

    Attributes:
        metrics: rows of metrics.jsonl, each a step.
        figures: rows of curve.json and best.json by file name.
        samples: (step, path) of the generator's or teacher's sample grids, in order.
        settings: resolved ones by dotted name, in the order of the file.
    """

    name: str
    metrics: list[dict[str, float]]
    figures: dict[str, list[Mapping[str, float]]]
    samples: list[tuple[int, Path]]
    settings: dict[str, Any]
    alarms: list[str]


def write_run_report(folders: Sequence[Path], path: Path) -> Path:
    """One page of these run folders.

    Raises:
        UserError: a folder is not one of a run, has not made a step, or a file of it is damaged.
    """
    runs = [read_run(folder) for folder in folders]
    title = runs[0].name if len(runs) == 1 else " and ".join(run.name for run in runs)
    return write_report(path, f"Run {title}" if len(runs) == 1 else f"Runs {title}", run_sections(runs))


def read_run(folder: Path) -> Run:
    """Read a run folder; a line cut short by a kill is left out."""
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(
            f"{folder} is not a run folder with finished steps: metrics.jsonl is not there; give a run.folder"
        )
    lines = _json_lines(folder / "metrics.jsonl")
    metrics = [{name: value for name, value in row.items() if _is_number(value)} for row in lines]
    if not metrics:
        raise UserError(f"{folder}: metrics.jsonl has no finished step yet; let the run go on for a while")
    figures = {name: _points(folder / name) for name in ("curve.json", "best.json") if (folder / name).is_file()}
    samples = _samples(folder / "samples", "generator") or _samples(folder / "samples", "teacher")
    settings = (
        _flat(read_json_object(folder / "settings.json", "remove it")) if (folder / "settings.json").is_file() else {}
    )
    alarms = _json_lines(folder / "alarms.jsonl") if (folder / "alarms.jsonl").is_file() else []
    return Run(
        folder.resolve().name, metrics, figures, samples, settings,
        [f"step {row['step']}: {row.get('alarm')}" for row in alarms],
    )  # fmt: skip


def run_sections(runs: Sequence[Run]) -> list[Section]:
    """Speed and length, sample history of each run, measured figures, one curve a loss, and where the settings differ."""
    sections: list[Section] = []
    if len(runs) == 1:
        sections.append(Tiles(_tiles(runs[0])))
    for run in runs:
        if run.samples:
            title = "Samples" if len(runs) == 1 else f"Samples of {run.name}"
            sections.append(
                Pictures([Picture(f"step {step}", _picture(path), 1) for step, path in _spread(run.samples)], title)
            )
    for name, label in (("curve.json", "Quality against training time"), ("best.json", "Measured at checkpoints")):
        series = [Series(run.name, _line(run.figures[name], "frechet_distance")) for run in runs if name in run.figures]
        if any(line.points for line in series):
            sections.append(Curve(label, series, "step", "Frechet distance"))
    names = dict.fromkeys(name for run in runs for row in run.metrics for name in row if name not in _NO_LOSSES)
    for name in names:
        series = [Series(run.name, averaged(_line(run.metrics, name))) for run in runs]
        series = [line for line in series if line.points]
        sections.append(Curve(name.replace("_", " "), series, "step", name.replace("_", " ")))
    sections.append(_settings_table(runs))
    alarms = [line for run in runs for line in run.alarms]
    return [*sections, Facts([f"Alarm, {line}" for line in alarms[-20:]])] if alarms else sections


def averaged(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of as many neighbours."""
    span = -(-len(points) // most) if points else 1
    groups = [points[start : start + span] for start in range(0, len(points), span)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _tiles(run: Run) -> list[tuple[str, str]]:
    known: dict[str, float] = {}
    for row in run.metrics:
        known |= row
    tiles = [(f"{int(known['step']) + 1:,}", "steps")]
    units = {"seconds": (60, "minutes of training"), "images_per_second": (1, "images per second at the end"),
             "peak_memory_gib": (1, "GiB of memory at most")}  # fmt: skip
    tiles += [(f"{known[name] / unit:.3g}", what) for name, (unit, what) in units.items() if name in known]
    waits = [row["data_wait_share"] for row in run.metrics if "data_wait_share" in row]
    if waits:
        tiles.append((f"{sum(waits) / len(waits):.2%}", "of the time of a step, waiting for data"))
    return tiles


def _settings_table(runs: Sequence[Run]) -> Table:
    """All settings of one run; of several only those that differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [[name, *(str(run.settings.get(name, "-")) for run in runs)] for name in names]
    if len(runs) == 1:
        return Table("Settings", ["", "value"], [row for row in rows if row[1] not in ("", "None")])
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return Table("Settings that differ", ["", *(run.name for run in runs)], differing)


def _line(rows: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if name in row and "step" in row]


def _spread(samples: Sequence[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """The first, the last, and some between."""
    count = min(MOST_PICTURES, len(samples))
    places = [round(place * (len(samples) - 1) / max(1, count - 1)) for place in range(count)]
    return [samples[place] for place in places]


def _samples(folder: Path, name: str) -> list[tuple[int, Path]]:
    found = [(path.stem.rpartition("_")[2], path) for path in folder.glob(f"{name}_*.png")]
    return sorted((int(step), path) for step, path in found if step.isdigit() and path.stem == f"{name}_{step}")


def _picture(path: Path) -> Tensor:
    """A PNG as (1, 3, H, W) in [-1, 1]."""
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and _is_number(row.get("step")):
            rows.append(row)
    return rows


def _points(path: Path) -> list[Mapping[str, float]]:
    """Rows of a watch's file; those of earlier versions, [minutes, distance], have no step and are not drawn."""
    rows = _json(path)
    found = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [{name: value for name, value in row.items() if _is_number(value)} for row in found]


def _is_number(value: Any) -> bool:
    """Whether it can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
