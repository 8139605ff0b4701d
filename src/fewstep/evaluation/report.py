"""The quick start's page: one self-contained HTML file with pictures, a curve, a table and the next commands."""

import base64
import html
import io
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fewstep.evaluation.protocols import Measurement
from fewstep.formats.atomic import replaced_file
from fewstep.formats.pixels import make_grid


@dataclass(frozen=True)
class CurvePoint:
    """Quality after some training time."""

    minutes: float
    frechet_distance: float


@dataclass(frozen=True)
class Report:
    """Everything the page shows.

    Attributes:
        teacher_images, generator_images: made from the same noise and labels, (N, C, H, W) in [-1, 1].
        columns: pictures a row in both grids.
        curve: the generator's distance over training time, measured on `curve_images` images.
        floor: distance of real hold-out images to the reference.
        facts: lines about machine, settings and seeds.
        next_commands: (command, what it does).
    """

    title: str
    teacher_images: Tensor
    generator_images: Tensor
    columns: int
    teacher: Measurement
    generator: Measurement
    floor: float
    floor_images: int
    curve: list[CurvePoint]
    curve_images: int
    facts: list[str] = field(default_factory=list)
    next_commands: list[tuple[str, str]] = field(default_factory=list)


def write_report(path: Path, report: Report) -> Path:
    """Write the page; it appears whole or not at all."""
    with replaced_file(path) as aside:
        aside.write_text(render_report(report), encoding="utf-8")
    return path


def render_report(report: Report) -> str:
    """The page as HTML text."""
    speedup = report.generator.images_per_second / report.teacher.images_per_second
    better = report.generator.frechet_distance <= report.teacher.frechet_distance
    verdict = "at or below" if better else "above"
    facts = "".join(f"<li>{html.escape(line)}</li>" for line in report.facts)
    commands = "".join(
        f"<dt><code>{html.escape(command)}</code></dt><dd>{html.escape(meaning)}</dd>"
        for command, meaning in report.next_commands
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(report.title)}</title><style>{_STYLE}</style></head><body><main>
<h1>{html.escape(report.title)}</h1>
<p class="lead">One evaluation instead of {report.teacher.evaluations_per_image}:
<b>{speedup:.0f}x</b> the images per second, Frechet distance <b>{report.generator.frechet_distance:.2f}</b>,
{verdict} the teacher's <b>{report.teacher.frechet_distance:.2f}</b>.</p>
<section class="pair">
{_figure("Teacher", report.teacher, report.teacher_images, report.columns)}
{_figure("Generator", report.generator, report.generator_images, report.columns)}
</section>
<p class="note">Both grids start from the same noise and labels. They need not show the same pictures: distribution
matching makes the generator's distribution match, not each sample.</p>
<h2>Quality against training time</h2>
{_curve(report)}
<h2>Figures</h2>
<table><thead><tr><th></th><th>Evaluations</th><th>Images/s</th><th>Frechet distance</th><th>Images behind it</th></tr></thead>
<tbody>{_row("Teacher (Heun)", report.teacher)}{_row("Generator", report.generator)}
<tr><td>Real hold-out pictures</td><td>-</td><td>-</td><td>{report.floor:.3f}</td><td>{report.floor_images}</td></tr>
</tbody></table>
<p class="note">Features: {html.escape(report.generator.features)}, against {report.generator.num_reference_images} real
training pictures; seed {report.generator.seed}. This is not the Inception FID of papers; compare only within this page.</p>
<ul class="facts">{facts}</ul>
<h2>Next</h2><dl>{commands}</dl>
</main></body></html>
"""


def _figure(title: str, measurement: Measurement, images: Tensor, columns: int) -> str:
    count = measurement.evaluations_per_image
    caption = f"{title}: {count} evaluation{'s' if count > 1 else ''}, {measurement.images_per_second:.0f} images/s"
    return (
        f'<figure><img alt="{html.escape(caption)}" src="{_png(images, columns)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _png(images: Tensor, columns: int) -> str:
    buffer = io.BytesIO()
    make_grid(images, columns).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _row(name: str, measurement: Measurement) -> str:
    return (
        f"<tr><td>{name}</td><td>{measurement.evaluations_per_image}</td><td>{measurement.images_per_second:.1f}</td>"
        f"<td>{measurement.frechet_distance:.3f}</td><td>{measurement.num_images}</td></tr>"
    )


def _curve(report: Report) -> str:
    """The generator's distance over time as inline SVG with a logarithmic axis, teacher and floor as lines."""
    import math

    width, height, left, bottom, top, right = 720, 300, 56, 40, 12, 130
    points = [point for point in report.curve if point.frechet_distance > 0]
    lines = [("teacher", report.teacher.frechet_distance), ("real hold-out", report.floor)]
    values = [point.frechet_distance for point in points] + [value for _, value in lines]
    low, high = math.log10(min(values) * 0.8), math.log10(max(values) * 1.25)
    last = max([point.minutes for point in points] + [0.1])

    def x(minutes: float) -> float:
        return left + (width - left - right) * minutes / last

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - math.log10(value)) / (high - low)

    parts = []
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for digit in (1, 2, 5):
            tick = digit * 10.0**exponent
            if low <= math.log10(tick) <= high:
                parts.append(
                    f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
                )
                parts.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    step = next(unit for unit in (0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 1e9) if last / unit <= 8)
    for number in range(int(last / step + 1e-6) + 1):
        place = x(number * step)
        parts.append(f'<text x="{place:.1f}" y="{height - bottom + 18}" text-anchor="middle">{number * step:g}</text>')
    for name, value in lines:
        parts.append(f'<line class="mark" x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{width - right + 8}" y="{y(value) + 4:.1f}">{name} {value:.2f}</text>')
    path = " ".join(f"{x(point.minutes):.1f},{y(point.frechet_distance):.1f}" for point in points)
    dots = "".join(
        f'<circle cx="{x(point.minutes):.1f}" cy="{y(point.frechet_distance):.1f}" r="3.5"/>' for point in points
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Frechet distance of the generator over training time">'
        f"{''.join(parts)}"
        f'<polyline points="{path}"/>{dots}'
        f'<text x="{(left + width - right) / 2}" y="{height - 4}" text-anchor="middle">minutes of training '
        f"({report.curve_images} images a point)</text></svg>"
    )


_STYLE = """
:root { --ink: #1c2128; --soft: #5b6470; --line: #d9dee4; --accent: #0b6e99; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7ebef; --soft: #9aa5b1; --line: #39424c; --accent: #57b6dd; --paper: #14181d; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.lead { font-size: 1.1rem; } .note, figcaption, .facts { color: var(--soft); font-size: .9rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1.25rem; margin-top: 1.5rem; }
figure { margin: 0; } img { width: 100%; image-rendering: pixelated; border: 1px solid var(--line); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .4rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; color: var(--soft); }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: var(--soft); }
svg .grid { stroke: var(--line); } svg .mark { stroke: var(--soft); stroke-dasharray: 5 4; }
svg polyline { fill: none; stroke: var(--accent); stroke-width: 2; } svg circle { fill: var(--accent); }
code { background: color-mix(in srgb, var(--line) 45%, transparent); padding: .1rem .35rem; border-radius: 4px; }
dt { margin-top: .7rem; } dd { margin: .1rem 0 0 1rem; color: var(--soft); }
"""
