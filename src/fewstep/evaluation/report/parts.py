"""What the quick starts' pages share: the page itself, pictures and the curve as inline data, facts and commands."""

import base64
import html
import io
import math
from dataclasses import dataclass

from torch import Tensor

from fewstep.formats.pixels import make_grid


@dataclass(frozen=True)
class CurvePoint:
    """Quality after some training time."""

    minutes: float
    frechet_distance: float


def render_page(title: str, body: str, facts: list[str], next_commands: list[tuple[str, str]]) -> str:
    """A self-contained HTML page: a title, its body (HTML), lines of facts and (command, what it does)."""
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in facts)
    commands = "".join(
        f"<dt><code>{html.escape(command)}</code></dt><dd>{html.escape(meaning)}</dd>"
        for command, meaning in next_commands
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>
<h1>{html.escape(title)}</h1>
{body}
<ul class="facts">{lines}</ul>
<h2>Next</h2><dl>{commands}</dl>
</main></body></html>
"""


def inline_png(images: Tensor, columns: int) -> str:
    """A grid of images (N, C, H, W) in [-1, 1] as a data URL."""
    buffer = io.BytesIO()
    make_grid(images, columns).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def render_curve(curve: list[CurvePoint], lines: list[tuple[str, float]], num_images: int) -> str:
    """The generator's distance over time as inline SVG with a logarithmic axis.

    Args:
        lines: (name, distance) of what it is compared with, drawn across.
        num_images: behind each point.
    """
    width, height, left, bottom, top, right = 720, 300, 56, 40, 12, 130
    points = [point for point in curve if point.frechet_distance > 0]
    values = [point.frechet_distance for point in points] + [value for _, value in lines]
    low, high = math.log10(min(values) * 0.8), math.log10(max(values) * 1.25)
    last = max([point.minutes for point in points] + [0.1])

    def x(minutes: float) -> float:
        return left + (width - left - right) * minutes / last

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - math.log10(value)) / (high - low)

    parts = []
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for digit in (1, 2, 5) if high - low > 0.7 else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9):
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
        f"({num_images} images a point)</text></svg>"
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
