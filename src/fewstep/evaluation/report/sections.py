"""What a report can show; each kind of section has a template of its name beside this file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """The few numbers that matter: (number, what it is)."""

    template: ClassVar[str] = "tiles.html"
    figures: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Text:
    """Sentences; a title makes them a chapter, none a remark."""

    template: ClassVar[str] = "text.html"
    lines: Sequence[str]
    title: str = ""


@dataclass(frozen=True)
class Picture:
    """A grid of images (N, C, H, W) in [-1, 1] with its caption."""

    caption: str
    images: Tensor
    columns: int


@dataclass(frozen=True)
class Pictures:
    """Grids beside each other, below each other on a phone."""

    template: ClassVar[str] = "pictures.html"
    pictures: Sequence[Picture]
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class PromptCards:
    """One card a prompt with its picture by every model.

    Attributes:
        columns: name of a model, or "real", to its pictures of all prompts, (N, C, H, W) in [-1, 1].
    """

    template: ClassVar[str] = "prompt_cards.html"
    title: str
    prompts: Sequence[str]
    columns: Mapping[str, Tensor]


@dataclass(frozen=True)
class Series:
    """A line of (x, y) points.

    Attributes:
        intervals: (low, high) that the y of each point is known to, NaN where nobody knows; empty for none.
    """

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Curve:
    """Lines over time. The vertical axis is logarithmic where all values are positive and differ by a factor of three.

    Attributes:
        marks: (name, value) of what the lines are compared with, drawn across; those far from all points are only named.
    """

    template: ClassVar[str] = "curve.html"
    title: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    marks: Sequence[tuple[str, float]] = ()
    note: str = ""


@dataclass(frozen=True)
class Curves:
    """Small curves beside each other, below each other on a phone."""

    template: ClassVar[str] = "curves.html"
    title: str
    curves: Sequence[Curve]
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Filmstrip:
    """Frames (caption, data URL) in one row, which scrolls where it is longer than the page is wide."""

    template: ClassVar[str] = "filmstrip.html"
    title: str
    frames: Sequence[tuple[str, str]]
    note: str = ""


@dataclass(frozen=True)
class Slider:
    """Two pictures of one size on each other, (caption, data URL): what is left of a line is the first one's."""

    template: ClassVar[str] = "slider.html"
    title: str
    left: tuple[str, str]
    right: tuple[str, str]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of each row its name; on a phone one card a row.

    Attributes:
        folded: shown when its title is clicked.
    """

    template: ClassVar[str] = "table.html"
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default_factory=list)
    warnings: Sequence[str] = field(default_factory=list)
    folded: bool = False


@dataclass(frozen=True)
class Facts:
    """Lines about machine, settings and seeds."""

    template: ClassVar[str] = "facts.html"
    lines: Sequence[str]


@dataclass(frozen=True)
class Commands:
    """What to type next: (command, what it does)."""

    template: ClassVar[str] = "commands.html"
    commands: Sequence[tuple[str, str]]


Section: TypeAlias = (
    Tiles | Text | Pictures | PromptCards | Curve | Curves | Filmstrip | Slider | Table | Facts | Commands
)
