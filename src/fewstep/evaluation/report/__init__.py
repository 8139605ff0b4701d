"""One self-contained HTML page made of sections: `write_report(path, title, sections)`."""

from fewstep.evaluation.report.page import render_report, write_report
from fewstep.evaluation.report.sections import (
    Commands,
    Curve,
    Facts,
    Picture,
    Pictures,
    PromptCards,
    Section,
    Series,
    Table,
    Text,
    Tiles,
)

__all__ = [
    "Commands", "Curve", "Facts", "Picture", "Pictures", "PromptCards", "Section", "Series", "Table", "Text", "Tiles",
    "render_report", "write_report",
]  # fmt: skip
