"""The page of `fewstep text-quickstart`: prompts beside pictures, a curve, figures, the next commands."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fewstep.evaluation.measure import Measurement
from fewstep.evaluation.report.parts import CurvePoint, inline_png, render_curve, render_page
from fewstep.evaluation.text_bench import NEIGHBOURS, TextMeasurement
from fewstep.formats.atomic import replaced_file


@dataclass(frozen=True)
class PromptPictures:
    """Pictures of the same prompts, teacher's and generator's from the same noise.

    Attributes:
        title: what these prompts are to the teacher.
        prompts: (N).
        teacher, generator: (N, 3, H, W) in [-1, 1].
        real: a real picture of each prompt, or None.
    """

    title: str
    prompts: Sequence[str]
    teacher: Tensor
    generator: Tensor
    real: Tensor | None = None


@dataclass(frozen=True)
class TextReport:
    """Everything the page shows.

    Attributes:
        pictures: tables of prompts, training and held-out ones apart.
        teacher, generator, real: figures; `real` has none on training texts.
        curve: the generator's distance over training time, on training texts.
        teacher_on_curve: the teacher's, measured on as many pictures as each point of the curve.
        settings: what the teacher was sampled with, for people.
        facts: lines about machine, settings and seeds.
        next_commands: (command, what it does).
    """

    title: str
    pictures: list[PromptPictures]
    teacher: TextMeasurement
    generator: TextMeasurement
    real: TextMeasurement
    curve: list[CurvePoint]
    teacher_on_curve: Measurement
    settings: str
    facts: list[str] = field(default_factory=list)
    next_commands: list[tuple[str, str]] = field(default_factory=list)

    @property
    def speedup(self) -> float:
        """Pictures a second of the generator over the teacher's."""
        assert self.generator.trained is not None
        assert self.teacher.trained is not None
        return self.generator.trained.images_per_second / self.teacher.trained.images_per_second


def write_text_report(path: Path, report: TextReport) -> Path:
    """Write the page; it appears whole or not at all."""
    with replaced_file(path) as aside:
        aside.write_text(render_text_report(report), encoding="utf-8")
    return path


def render_text_report(report: TextReport) -> str:
    """The page as HTML text."""
    teacher, generator = report.teacher.trained, report.generator.trained
    assert teacher is not None
    assert generator is not None
    following, control = report.generator.following, report.generator.following.shuffled
    body = f"""<style>{_STYLE}</style>
<p class="lead">{generator.evaluations_per_image} evaluations without guidance instead of {teacher.evaluations_per_image}
guided ones: <b>{report.speedup:.0f}x</b> the pictures per second. Frechet distance
<b>{generator.frechet_distance:.2f}</b> against the teacher's <b>{teacher.frechet_distance:.2f}</b>; of
{following.num_images} prompts that nobody was trained on, <b>{following.agreement:.0%}</b> are followed, the teacher
follows {report.teacher.following.agreement:.0%}, and shuffled prompts would be by {control:.0%}.</p>
{"".join(_prompt_table(pictures, report.settings) for pictures in report.pictures)}
<p class="note">Prompts are the first of each category in a random order, nobody chose them by their pictures. Teacher and
generator start from the same noise and need not show the same picture: distribution matching makes distributions match.</p>
<h2>Quality against training time</h2>
{render_curve(report.curve, [("teacher", report.teacher_on_curve.frechet_distance)], report.teacher_on_curve.num_images)}
<p class="note">Every point and the teacher's line have {report.teacher_on_curve.num_images} pictures; the distances of the
table have more, which makes them smaller.</p>
<h2>Figures</h2>
<table><thead><tr><th></th><th>Evaluations</th><th>Images/s</th><th>Frechet distance, training texts</th>
<th>Frechet distance, held-out texts</th><th>Right category</th><th>shuffled prompts</th>
<th>Own picture among nearest {NEIGHBOURS}</th></tr></thead>
<tbody>{_row("Teacher", report.teacher)}{_row("Generator", report.generator)}{_row("Real held-out pictures", report.real)}
</tbody></table>
<p class="note">Features and categories: {html.escape(generator.features)}, against one real picture for each of
{generator.num_reference_images} training texts; seed {generator.seed}. In brackets the pictures behind a figure. So few
held-out texts make any distance larger: compare that column within itself. This is not the Inception FID of papers.
Right category: the classifier sees the category that the prompt asks for, on held-out texts; beside it the same after
the prompts changed places, on average. Own picture: the real picture of the same text is among the {NEIGHBOURS} nearest of
{following.num_images} real ones, which chance makes true for {NEIGHBOURS / following.num_images:.0%}.</p>"""
    return render_page(report.title, body, report.facts, report.next_commands)


def _prompt_table(pictures: PromptPictures, settings: str) -> str:
    columns = [(f"teacher, {settings}", pictures.teacher), ("generator", pictures.generator)]
    if pictures.real is not None:
        columns.insert(0, ("real", pictures.real))
    cards = []
    for number, prompt in enumerate(pictures.prompts):
        shown = "".join(
            f'<img alt="{html.escape(f"{name}: {prompt}")}" title="{html.escape(name)}" '
            f'src="{inline_png(images[number : number + 1], 1)}">'
            for name, images in columns
        )
        cards.append(f"<figure>{shown}<figcaption>{html.escape(prompt)}</figcaption></figure>")
    names = " · ".join(html.escape(name) for name, _ in columns)
    return (
        f'<h2>{html.escape(pictures.title)}</h2><p class="note">Each from left to right: {names}.</p>'
        f'<section class="prompts">{"".join(cards)}</section>'
    )


def _row(name: str, found: TextMeasurement) -> str:
    return f"<tr><td>{name}</td>{''.join(f'<td>{cell}</td>' for cell in found.cells())}</tr>"


_STYLE = """
.prompts { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem; }
.prompts figure { display: flex; flex-wrap: wrap; gap: 4px; align-content: flex-start; }
.prompts img { flex: 1 1 0; min-width: 0; max-width: 128px; } .prompts figcaption { flex-basis: 100%; }
"""
