"""Where the lines, ticks and names of a curve lie on its canvas."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fewstep.evaluation.report.sections import Curve, Series

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 68, 12, 14, 44
_FEWEST_PIXELS = 15  # between the names of two marks
_BESIDE = 4.0  # pixels between the intervals of two lines at one place


@dataclass(frozen=True)
class Line:
    """A series on the canvas: its name, its dots, the intervals (x, low, high), and all dots as SVG writes points."""

    name: str
    dots: list[tuple[float, float]]
    bars: list[tuple[float, float, float]]

    @property
    def path(self) -> str:
        """For a polyline."""
        return " ".join(f"{x},{y}" for x, y in self.dots)


@dataclass(frozen=True)
class Mark:
    """A line across, with the height of its name."""

    text: str
    y: float
    text_y: float


@dataclass(frozen=True)
class Plot:
    """Everything the template draws, in the canvas's pixels; `away` names the marks that are off the axis."""

    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[Mark]
    away: list[str]
    scale: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def plot_curve(curve: Curve) -> Plot:
    """Lay a curve out: axes reach from the smallest to the largest value with a little room, and no further."""
    ends = [end for series in curve.series for interval in series.intervals for end in interval]
    values = [y for series in curve.series for _, y in series.points]
    values = [y for y in [*values, *ends] if math.isfinite(y)] or [1.0]
    log = min(values) > 0 and max(values) > 3 * min(values)
    far = _is_far_log if log else _is_far_linear
    near = [(name, value) for name, value in curve.marks if not far(value, values)]
    shown = values + [value for _, value in near]
    forth = math.log10 if log else float
    low, high = forth(min(shown)), forth(max(shown))
    room = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    low, high = low - room, high + room
    first, last = _ends([x for series in curve.series for x, _ in series.points])

    def x_of(x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (x - first) / (last - first), 1)

    def y_of(y: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - forth(y)) / (high - low), 1)

    ticks = _log_ticks(low, high) if log else _linear_ticks(low, high, 6)
    return Plot(
        [
            _line(series, x_of, y_of, _BESIDE * (number - (len(curve.series) - 1) / 2))
            for number, series in enumerate(curve.series)
        ],
        [(x_of(tick), _short(tick)) for tick in _linear_ticks(first, last, 8)],
        [(y_of(tick), _short(tick)) for tick in ticks],
        _marks(near, y_of),
        [f"{name} {value:.3g}" for name, value in curve.marks if (name, value) not in near],
        "logarithmic" if log else "linear",
    )  # fmt: skip


def _line(series: Series, x_of: Callable[[float], float], y_of: Callable[[float], float], beside: float) -> Line:
    spans = [(x, *interval) for (x, _), interval in zip(series.points, series.intervals, strict=False)]
    bars = [
        (round(x_of(x) + beside, 1), y_of(low), y_of(high))
        for x, low, high in spans
        if math.isfinite(low) and math.isfinite(high)
    ]
    return Line(series.name, [(x_of(x), y_of(y)) for x, y in series.points if math.isfinite(y)], bars)


def _is_far_log(value: float, values: Sequence[float]) -> bool:
    return value <= 0 or not min(values) / 3 <= value <= max(values) * 3


def _is_far_linear(value: float, values: Sequence[float]) -> bool:
    room = max(values) - min(values) or abs(max(values))
    return not min(values) - room <= value <= max(values) + room


def _ends(numbers: Sequence[float]) -> tuple[float, float]:
    first, last = min(numbers, default=0.0), max(numbers, default=1.0)
    first = 0.0 if 0 < first < 0.2 * last else first
    return (first, last) if last > first else (first, first + 1.0)


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high, at most `most` of them."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (unit * factor) <= most - 1)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [round(number * step, 12) for number in numbers]


def _short(number: float) -> str:
    """At most five characters, so that numbers stay clear of the axis's name."""
    text = f"{number:g}"
    if len(text) <= 5 and "e" not in text:
        return text
    digits, _, exponent = f"{number:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def _log_ticks(low: float, high: float) -> list[float]:
    """Of each decade 1, 2, 5; more where there is hardly one decade; only the powers of ten where there are many."""
    span = high - low
    digits = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if span <= 0.7 else (1, 2, 5) if span <= 3 else (1,)
    exponents = range(math.floor(low), math.ceil(high) + 1, math.ceil(span / 8))
    ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def _marks(near: Sequence[tuple[str, float]], y_of: Callable[[float], float]) -> list[Mark]:
    """Names stand above their lines, from the top down, none on another."""
    marks: list[Mark] = []
    for name, value in sorted(near, key=lambda mark: -mark[1]):
        above = y_of(value) - 5
        lowest = marks[-1].text_y + _FEWEST_PIXELS if marks else TOP + 8
        marks.append(Mark(f"{name} {value:.2f}", y_of(value), max(above, lowest)))
    return marks
