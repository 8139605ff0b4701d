"""The curves of a run's page: quality with intervals, statistics of the samples, losses, gradient norms, speed and memory."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from fewstep.evaluation.measurement import DISTANCE, JUDGE, NAMES
from fewstep.evaluation.report.run_files import WATCHED, Run
from fewstep.evaluation.report.sections import Curve, Curves, Section, Series, Table
from fewstep.evaluation.scores import Score, differences

MOST_POINTS = 200  # of a line: more are averaged
BARS = "bars are two standard errors: how far other pictures of the same model would move a figure."
_SPEED = {
    "images_per_second": "images per second", "peak_memory_gib": "GiB of memory at most",
    "data_wait_share": "share of a step that waits for data",
}  # fmt: skip
_WATCHED_TITLES = dict(zip(WATCHED, ("Quality while it trained", "Quality at checkpoints"), strict=True))
_STATISTICS = ("saturation", "contrast", "diversity", "seed_diversity")
Points = list[tuple[float, float]]


def quality_sections(runs: Sequence[Run]) -> list[Section]:
    """What training measured and what `fewstep evaluate` found, against steps and time, each with its conditions."""
    sections: list[Section] = []
    for name, title in _WATCHED_TITLES.items():
        rows = {run.name: run.figures[name] for run in runs if name in run.figures}
        curves = _against_both("Frechet distance", partial(_watched_series, rows))
        if curves:
            notes = [line for run in runs for line in _watch_notes(run, name, len(runs) > 1)]
            sections.append(Curves(title, curves, notes))
    if any(run.scores for run in runs):
        sections += _score_sections(runs)
    return sections


def statistics_sections(runs: Sequence[Run]) -> list[Section]:
    """Saturation, contrast and diversity of the samples, the teacher's as lines across."""
    curves = []
    for name in _STATISTICS:
        series = [Series(run.name, _line(run.statistics, name)) for run in runs]
        marks = [
            (f"teacher of {run.name}" if len(runs) > 1 else "teacher", run.teacher_statistics[name])
            for run in runs
            if name in run.teacher_statistics
        ]
        same = len({value for _, value in marks}) == 1
        if any(y for one in series for _, y in one.points) or any(value for _, value in marks):
            curves += _curve(name.replace("_", " "), series, "step", [("teacher", marks[0][1])] if same else marks)
    note = (
        "Saturation: the largest minus the smallest colour channel, not drawn where it is always 0: grey pictures. Contrast: "
        "standard deviation of a picture's pixels. Diversity: how far two pictures differ; seed diversity: two of one prompt or class."
    )
    return [Curves("Saturation, contrast and diversity of the samples", curves, [note])] if curves else []


def metric_sections(runs: Sequence[Run]) -> list[Section]:
    """Losses, gradient norms, everything else that was noted, speed and memory."""
    names = dict.fromkeys(
        name for run in runs for row in run.metrics for name in row if name not in ("step", "seconds")
    )
    groups: dict[str, list[Curve]] = {
        "Losses": [],
        "Gradient norms": [],
        "Other metrics": [],
        "Throughput and memory": [],
    }
    for name in names:
        series = [Series(run.name, averaged(_line(run.metrics, name))) for run in runs]
        groups[_group(name)] += _curve(_SPEED.get(name, name.replace("_", " ")), series, "step")
    warned = {title: _not_drawn(runs, title) for title in groups}
    return [Curves(title, curves, (), warned[title]) for title, curves in groups.items() if curves or warned[title]]


def averaged(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> Points:
    """At most `most` points, each the mean of as many neighbours."""
    span = -(-len(points) // most) if points else 1
    groups = [points[start : start + span] for start in range(0, len(points), span)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _not_drawn(runs: Sequence[Run], title: str) -> list[str]:
    """A line for each metric of a group with values that no curve has room for: it joins the steps beside them."""
    return [
        f"warning: {run.name}: {name.replace('_', ' ')} is NaN or infinite in {count:,} step{'s' * (count != 1)}, which its curve leaves out"
        for run in runs for name, count in run.not_drawn.items() if _group(name) == title
    ]  # fmt: skip


def _group(name: str) -> str:
    if name in _SPEED:
        return "Throughput and memory"
    return "Losses" if name.endswith("loss") else "Gradient norms" if "norm" in name else "Other metrics"


def _score_sections(runs: Sequence[Run]) -> list[Section]:
    """Figures of evaluation.json: curves with intervals, and a table of the last and best with every condition."""
    known = dict.fromkeys(name for run in runs for score in run.scores for name in score.found.values)
    names = sorted((name for name in known if name != "images_per_second"), key=lambda name: name != DISTANCE)
    labels = {name: NAMES.get(name, name.replace("_", " ")) for name in names}
    proxy = " (PROXY)" * any(score.found.proxy for run in runs for score in run.scores)
    curves: list[Curve] = []
    for name in names:
        made = _against_both(labels[name] + proxy, partial(_score_series, runs, name))
        curves += made if name == DISTANCE else made[:1]
    shown = [(run, score) for run in runs for score in _best_and_last(run.scores)]
    scores = [score for run in runs for score in run.scores]
    others = dict.fromkeys(name for score in scores for name, *_ in differences(scores[0].found, score.found))
    named = ", ".join(name.replace("_", " ") for name in others)
    warnings = [
        f"warning: these figures were not all measured in one way ({named} differ); compare only those with equal conditions"
    ]
    proxies = [f"{way}." for way in dict.fromkeys(score.found.way for score in scores if score.found.proxy)]
    cautions = dict.fromkeys(line for _, score in shown for line in score.found.cautions())
    table = Table(
        "Figures", ["", "evaluations per image", *labels.values()],
        [[_told(run, score, len(runs) > 1), *score.found.cells(tuple(names))] for run, score in shown],
        [score.found.sentence() for _, score in shown], [*warnings * bool(others), *cautions],
    )  # fmt: skip
    note = BARS.capitalize()
    return [*([Curves("Quality of checkpoints", curves, [note], proxies)] if curves else []), table]


def _best_and_last(scores: Sequence[Score]) -> list[Score]:
    """Of each kind of weights the one with the lowest distance, and the last one."""
    shown = []
    for weights in dict.fromkeys(score.weights for score in scores):
        of = [score for score in scores if score.weights == weights]
        best = min(of, key=lambda score: score.found.get(DISTANCE) or math.inf)
        shown += [best] if best is of[-1] else [best, of[-1]]
    return shown


def _told(run: Run, score: Score, several: bool) -> str:
    parts = [run.name] * several + [f"{score.weights} weights"] * bool(score.weights)
    parts += [f"step {score.step:,.0f}"] * math.isfinite(score.step)
    parts += [f"PROXY of {score.found.protocol}"] * bool(score.found.proxy)
    return ", ".join(parts) or score.found.model


def _watched_series(rows: Mapping[str, Sequence[Mapping[str, float]]], along: str) -> list[Series]:
    series = []
    for run, of in rows.items():
        drawn = [row for row in of if DISTANCE in row and along in row]
        intervals = [tuple(row.get(f"{DISTANCE}_{end}", math.nan) for end in ("low", "high")) for row in drawn]
        series.append(Series(run, _line(drawn, DISTANCE, along), [(low, high) for low, high in intervals]))
    return series


def _score_series(runs: Sequence[Run], name: str, along: str) -> list[Series]:
    series = []
    for run in runs:
        for weights in dict.fromkeys(score.weights for score in run.scores):
            points, intervals = [], []
            for score in run.scores:
                x = score.step if along == "step" else score.seconds
                if score.weights == weights and name in score.found.values and math.isfinite(x):
                    points.append((x, score.found[name]))
                    intervals.append(score.found.values[name].interval or (math.nan, math.nan))
            label = f"{weights} weights" if weights else "model"
            series.append(Series(f"{run.name}, {label}" if len(runs) > 1 else label, points, intervals))
    return series


def _against_both(label: str, make: Callable[[str], list[Series]]) -> list[Curve]:
    """One curve against steps, one against training time; none without points."""
    by_time = make("seconds")
    longest = max((x for series in by_time for x, _ in series.points), default=0.0)
    unit, what = (3600, "hours of training") if longest >= 7200 else (60, "minutes of training")
    scaled = [Series(one.name, [(x / unit, y) for x, y in one.points], one.intervals) for one in by_time]
    by_step = _curve(label, make("step"), "step", title=f"{label} against steps")
    return [*by_step, *_curve(label, scaled, what, title=f"{label} against time")]


def _curve(
    label: str, series: Sequence[Series], x_label: str, marks: Sequence[tuple[str, float]] = (), title: str = ""
) -> list[Curve]:
    """A curve, on which a series without points keeps its place, so that a run has one colour; none where no series has any."""
    return [Curve(title or label, series, x_label, label, marks)] if any(one.points for one in series) else []


def _watch_notes(run: Run, name: str, several: bool) -> list[str]:
    """How training measured: of best.json the settings say it, of a quick start's curve the rows themselves."""
    if name not in run.figures:
        return []
    counts = sorted({int(row["num_images"]) for row in run.figures[name] if "num_images" in row})
    settings = run.settings
    if name == "best.json" and settings.get("best.files"):
        features, *reference = settings["best.files"]
        of = (
            f"features {features}, reference {reference[0]}"
            if reference
            else "features trained by the run, of its own pictures"
        )
        how = f"{settings.get('best.num_images')} images, {of}, seed 1"
    else:
        judges = list(dict.fromkeys(str(row[JUDGE]) for row in run.figures[name] if JUDGE in row))
        by = " or ".join(judges) or "features and reference not recorded here"
        how = f"{' or '.join(map(str, counts)) or 'an unrecorded number of'} images, {by}"
    if precision := settings.get("compute.precision"):
        how += f", precision {precision}"
    known = any(f"{DISTANCE}_low" in row for row in run.figures[name])
    return [f"{f'{run.name}: ' * several}{how}; {BARS if known else 'without intervals.'}"]


def _line(rows: Sequence[Mapping[str, float]], name: str, along: str = "step") -> Points:
    return [(row[along], row[name]) for row in rows if name in row and along in row]
