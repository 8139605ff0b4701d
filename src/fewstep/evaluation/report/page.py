"""Rendering sections to one HTML file that needs nothing beside it."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from fewstep import __version__
from fewstep.evaluation.report.plot import plot_curve
from fewstep.evaluation.report.sections import Section
from fewstep.formats.atomic import replaced_file
from fewstep.formats.pixels import make_grid


def write_report(path: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write the page; it appears whole or not at all."""
    with replaced_file(path) as aside:
        aside.write_text(render_report(title, sections), encoding="utf-8")
    return path


def render_report(title: str, sections: Sequence[Section]) -> str:
    """The page as HTML text; everything that is not a picture is escaped."""
    environment = Environment(
        loader=PackageLoader("fewstep.evaluation.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"inline_png": inline_png, "plot": plot_curve}
    return environment.get_template("page.html").render(title=title, sections=sections, version=__version__)


def inline_png(images: Tensor, columns: int) -> str:
    """A grid of images (N, C, H, W) in [-1, 1] as a data URL."""
    buffer = io.BytesIO()
    make_grid(images, columns).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
