"""One self-contained HTML page made of sections: `write_report(path, title, sections)`."""

from fewstep.evaluation.report.page import render_report, write_report
from fewstep.evaluation.report.sections import (
    Commands,
    Curve,
    Curves,
    Facts,
    Filmstrip,
    Picture,
    Pictures,
    PromptCards,
    Section,
    Series,
    Slider,
    Table,
    Text,
    Tiles,
)

__all__ = [
    "Commands", "Curve", "Curves", "Facts", "Filmstrip", "Picture", "Pictures", "PromptCards", "Section", "Series", "Slider", "Table",
    "Text", "Tiles", "render_report", "write_report",
]  # fmt: skip
