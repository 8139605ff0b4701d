"""Reading a run folder for its report: what training, its watches and `fewstep evaluate` left there, finished or not."""

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.errors import UserError
from fewstep.evaluation.measurement import JUDGE
from fewstep.evaluation.scores import SCORES, Score, is_number, parse_scores
from fewstep.formats.json_files import read_json_object
from fewstep.settings import PretrainSettings, TrainSettings, renew_settings

WATCHED = ("curve.json", "best.json")  # files of points that training itself measured


@dataclass(frozen=True)
class Run:
    """What a run folder says of itself.

    Attributes:
        metrics: rows of metrics.jsonl, each a step.
        figures: rows of curve.json and best.json by file name.
        samples: (step, path) of the generator's or teacher's sample grids, in order.
        settings: resolved ones by dotted name, in the order of the file.
        scores: of evaluation.json.
        statistics: rows of sample_statistics.jsonl.
        teacher_statistics: the same of the teacher's samples, by name.
        teacher_samples: the grid that the teacher made of the noise that the generator's samples begin with.
        wishes: the sample grids' classes or prompts, in order.
        not_drawn: how many values of metrics.jsonl are NaN or too large for a curve, by name.
    """

    name: str
    folder: Path
    metrics: list[dict[str, float]]
    figures: dict[str, list[Mapping[str, Any]]]
    samples: list[tuple[int, Path]]
    settings: dict[str, Any]
    alarms: list[str]
    scores: list[Score] = field(default_factory=list)
    statistics: list[dict[str, float]] = field(default_factory=list)
    teacher_statistics: dict[str, float] = field(default_factory=dict)
    teacher_samples: Path | None = None
    wishes: list[str] = field(default_factory=list)
    not_drawn: dict[str, int] = field(default_factory=dict)


def read_run(folder: Path) -> Run:
    """Read a run folder; a line cut short by a kill is left out.

    Raises:
        UserError: it is not one of a run, has not made a step, or a file of it is damaged.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(
            f"{folder} is not a run folder with finished steps: metrics.jsonl is not there; give a run.folder"
        )
    metrics = _numbers(folder / "metrics.jsonl")
    if not metrics:
        raise UserError(f"{folder}: metrics.jsonl has no finished step yet; let the run go on for a while")
    generated, taught = (_samples(folder / "samples", name) for name in ("generator", "teacher"))
    notes = sorted((folder / "samples").glob("*.txt"))
    return Run(
        folder.resolve().name, folder, metrics,
        {name: _points(folder / name) for name in WATCHED if (folder / name).is_file()},
        generated or taught, _settings(_object(folder / "settings.json")),
        [f"step {row['step']}: {row.get('alarm')}" for row in _json_lines(folder / "alarms.jsonl")],
        _scores(folder / SCORES), _numbers(folder / "sample_statistics.jsonl"),
        {name: value for name, value in _object(folder / "teacher_statistics.json").items() if is_number(value)},
        taught[0][1] if generated and taught else None,
        [line for note in notes for line in note.read_text(encoding="utf-8", errors="replace").splitlines()],
        dict(Counter(
            name for row in _json_lines(folder / "metrics.jsonl") for name, value in row.items()
            if isinstance(value, float) and not is_number(value)
        )),
    )  # fmt: skip


def open_picture(path: Path) -> Image.Image:
    """A picture in RGB.

    Raises:
        UserError: it is damaged, or has more pixels than PIL reads.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except Image.DecompressionBombError:
        raise UserError(
            f"{path} has too many pixels for a page; move it away and lower the second of run.samples"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it") from error


def single_pictures(run: Run, grid: Image.Image) -> list[Image.Image]:
    """The pictures of one of the run's sample grids; the whole grid where its columns are not those of the settings."""
    count = sampled(run) or 1
    columns = min(10, count)
    rows = -(-count // columns)
    width, height = (grid.width + 1) // columns - 1, (grid.height + 1) // rows - 1
    if (columns * (width + 1), rows * (height + 1)) != (grid.width + 1, grid.height + 1) or min(width, height) < 1:
        return [grid]
    corners = [(place % columns * (width + 1), place // columns * (height + 1)) for place in range(count)]
    return [grid.crop((left, top, left + width, top + height)) for left, top in corners]


def sampled(run: Run) -> int:
    """Pictures in each of the run's sample grids, 0 where its settings do not say."""
    noted = run.settings.get("run.samples")
    count = noted[1] if isinstance(noted, list) and len(noted) == 2 else 0
    return count if isinstance(count, int) and count > 0 else 0


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """By dotted name of today, whatever version wrote them."""
    kind = PretrainSettings if "network" in values else TrainSettings
    with suppress(UserError, TypeError, AttributeError):  # no report depends on them
        values = renew_settings(kind, values, "settings.json")
    return _flat(values)


def _samples(folder: Path, name: str) -> list[tuple[int, Path]]:
    found = [(path.stem.rpartition("_")[2], path) for path in folder.glob(f"{name}_*.png")]
    return sorted((int(step), path) for step, path in found if step.isdigit() and path.stem == f"{name}_{step}")


def _scores(path: Path) -> list[Score]:
    """The rows of a watched run, or the one figure that `fewstep evaluate --json` wrote."""
    if not path.is_file():
        return []
    try:
        return parse_scores(_json(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it") from None


def _object(path: Path) -> dict[str, Any]:
    return read_json_object(path, "remove it") if path.is_file() else {}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it") from error


def _numbers(path: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if is_number(value)} for row in _json_lines(path)]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and is_number(row.get("step")):
            rows.append(row)
    return rows


def _points(path: Path) -> list[Mapping[str, Any]]:
    """Rows of a watch's file, numbers and the judge in words; those of earlier versions, [minutes, distance], have no step and are not drawn."""
    rows = _json(path)
    found = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [{name: value for name, value in row.items() if is_number(value) or name == JUDGE} for row in found]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
