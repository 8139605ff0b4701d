"""The quick start's page: one self-contained HTML file with pictures, a curve, a table and the next commands."""

import html
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fewstep.evaluation.measure import Measurement
from fewstep.evaluation.report.parts import CurvePoint, inline_png, render_curve, render_page
from fewstep.formats.atomic import replaced_file


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
    lines = [("teacher", report.teacher.frechet_distance), ("real hold-out", report.floor)]
    body = f"""<p class="lead">One evaluation instead of {report.teacher.evaluations_per_image}:
<b>{speedup:.0f}x</b> the images per second, Frechet distance <b>{report.generator.frechet_distance:.2f}</b>,
{verdict} the teacher's <b>{report.teacher.frechet_distance:.2f}</b>.</p>
<section class="pair">
{_figure("Teacher", report.teacher, report.teacher_images, report.columns)}
{_figure("Generator", report.generator, report.generator_images, report.columns)}
</section>
<p class="note">Both grids start from the same noise and labels. They need not show the same pictures: distribution
matching makes the generator's distribution match, not each sample.</p>
<h2>Quality against training time</h2>
{render_curve(report.curve, lines, report.curve_images)}
<h2>Figures</h2>
<table><thead><tr><th></th><th>Evaluations</th><th>Images/s</th><th>Frechet distance</th><th>Images behind it</th></tr></thead>
<tbody>{_row("Teacher (Heun)", report.teacher)}{_row("Generator", report.generator)}
<tr><td>Real hold-out pictures</td><td>-</td><td>-</td><td>{report.floor:.3f}</td><td>{report.floor_images}</td></tr>
</tbody></table>
<p class="note">Features: {html.escape(report.generator.features)}, against {report.generator.num_reference_images} real
training pictures; seed {report.generator.seed}. This is not the Inception FID of papers; compare only within this page.</p>"""
    return render_page(report.title, body, report.facts, report.next_commands)


def _figure(title: str, measurement: Measurement, images: Tensor, columns: int) -> str:
    count = measurement.evaluations_per_image
    caption = f"{title}: {count} evaluation{'s' if count > 1 else ''}, {measurement.images_per_second:.0f} images/s"
    return (
        f'<figure><img alt="{html.escape(caption)}" src="{inline_png(images, columns)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _row(name: str, measurement: Measurement) -> str:
    return (
        f"<tr><td>{name}</td><td>{measurement.evaluations_per_image}</td><td>{measurement.images_per_second:.1f}</td>"
        f"<td>{measurement.frechet_distance:.3f}</td><td>{measurement.num_images}</td></tr>"
    )
