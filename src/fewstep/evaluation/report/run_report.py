"""The page of any run folder, or of several beside each other: sample history, quality, losses, speed, settings."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fewstep.errors import UserError
from fewstep.evaluation.report.inline import data_url, shrunk, stacked, tiled
from fewstep.evaluation.report.page import write_report
from fewstep.evaluation.report.run_curves import metric_sections, quality_sections, statistics_sections
from fewstep.evaluation.report.run_files import Run, open_picture, read_run, single_pictures
from fewstep.evaluation.report.sections import Facts, Filmstrip, Section, Slider, Table, Tiles

PICTURE_BYTES = 3_000_000  # of a page, in films and sliders; a page has less than 5 MB
MOST_FRAMES, FRAME_PICTURES, FRAME_SIDE, SLIDER_SIDE = 24, 8, 160, 1400
SLIDER_PICTURES, SLIDER_COLUMNS = 24, 6  # so few columns that a phone shows something
_WISH_LETTERS = 600


def write_run_report(folders: Sequence[Path], path: Path, more: Sequence[Section] = ()) -> Path:
    """One page of these run folders.

    Args:
        more: sections after the samples, of what had to be computed.

    Raises:
        UserError: a folder is not one of a run, has not made a step, or is named twice, or a file of it is damaged.
    """
    runs = told_apart([read_run(folder) for folder in folders])
    title = runs[0].name if len(runs) == 1 else " and ".join(run.name for run in runs)
    return write_report(path, f"Run {title}" if len(runs) == 1 else f"Runs {title}", run_sections(runs, more))


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, those of one name with as much of their path before it as tells them apart.

    Raises:
        UserError: one is there twice.
    """
    places = [run.folder.resolve() for run in runs]
    if twice := [place for place in places if places.count(place) > 1]:
        raise UserError(f"{twice[0]} is named twice; name each run once")
    found = []
    for run, place in zip(runs, places, strict=True):
        alike = [other for other in places if other != place and other.name == place.name]
        parts = 1
        while any(other.parts[-parts:] == place.parts[-parts:] for other in alike):
            parts += 1
        found.append(replace(run, name="/".join(place.parts[-parts:])))
    return found


def run_sections(runs: Sequence[Run], more: Sequence[Section] = ()) -> list[Section]:
    """Speed and length, samples of each run through training and against the teacher's, quality, losses, settings."""
    sections: list[Section] = [Tiles(_tiles(runs[0]))] if len(runs) == 1 else []
    for run in runs:
        of = "" if len(runs) == 1 else f" of {run.name}"
        sections += _samples(run, of, PICTURE_BYTES // len(runs))
    sections += [*more, *quality_sections(runs), *statistics_sections(runs), *metric_sections(runs)]
    sections.append(_settings_table(runs))
    alarms = [line for run in runs for line in run.alarms]
    return [*sections, Facts([f"Alarm, {line}" for line in alarms[-20:]])] if alarms else sections


def _samples(run: Run, of: str, most_bytes: int) -> list[Section]:
    """A film of the run's samples, and the last of them against the teacher's."""
    if not run.samples:
        return []
    shown = _spread(run.samples)
    frames = []
    for step, path in shown:
        pictures = [shrunk(one, FRAME_SIDE) for one in single_pictures(run, open_picture(path))[:FRAME_PICTURES]]
        frames.append((f"step {step:,}", data_url(stacked(pictures), most_bytes // 2 // len(shown))))
    left_out = len(run.samples) - len(shown)
    note = "Each row is one seed." + f" {left_out} of {len(run.samples)} are not shown." * bool(left_out)
    film = Filmstrip(f"Samples{of} through training", frames, f"{note} {_wishes(run.wishes[:FRAME_PICTURES])}".strip())
    if run.teacher_samples is None:
        return [film]
    step, last = run.samples[-1]
    grids = [single_pictures(run, open_picture(path))[:SLIDER_PICTURES] for path in (last, run.teacher_samples)]
    pair = [shrunk(tiled(grid, _columns(len(grid))), SLIDER_SIDE) for grid in grids]
    if pair[0].size != pair[1].size:  # run.samples may change between the sessions of a run
        return [film]
    generator, teacher = (data_url(picture, most_bytes // 4) for picture in pair)
    return [
        film,
        Slider(
            f"Generator against teacher{of}", (f"generator, step {step:,}", generator), ("teacher", teacher),
            f"Both begin with the same noise. {_wishes(run.wishes[: len(grids[0])] if len(grids[0]) > 1 else run.wishes)}".strip(),
        ),
    ]  # fmt: skip


def _columns(count: int) -> int:
    """Of a slider's pictures: as many as leave no gap in the last row, at most `SLIDER_COLUMNS`."""
    most = min(SLIDER_COLUMNS, count)
    return next((columns for columns in range(most, 2, -1) if count % columns == 0), most)


def _wishes(wishes: Sequence[str]) -> str:
    """What the pictures show, in order, cut where that is long."""
    once = list(dict.fromkeys(wishes))
    repeats = len(once) < len(wishes) and all(one == once[place % len(once)] for place, one in enumerate(wishes))
    told = " · ".join(once if repeats else wishes)
    end = " ..." if len(told) > _WISH_LETTERS else " · and again." if repeats else "."
    return f"In order: {told[:_WISH_LETTERS]}{end}" if told else ""


def _spread(samples: Sequence[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """The first, the last, and some between."""
    count = min(MOST_FRAMES, len(samples))
    places = [round(place * (len(samples) - 1) / max(1, count - 1)) for place in range(count)]
    return [samples[place] for place in places]


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
    """All settings of one run, folded; of several only those that differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [[name, *(str(run.settings.get(name, "-")) for run in runs)] for name in names]
    if len(runs) == 1:
        return Table("Settings", ["", "value"], [row for row in rows if row[1] not in ("", "None")], folded=True)
    differing = [row for row in rows if len(set(row[1:])) > 1 and row[0] != "run.folder"]
    return Table("Settings that differ", ["", *(run.name for run in runs)], differing)
