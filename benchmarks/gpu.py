"""Correctness, speed and memory on a GPU, with nothing but torch and fewstep: one command, one table.

    python benchmarks/gpu.py --minutes 8 --out runs/gpu                everything, or what fits into 8 minutes
    python benchmarks/gpu.py --parts correctness edm levers            some of it

Parts run in order, each within its share of the time; what a part finds is written to OUT/gpu.json as it comes, so that
a killed run keeps it, and a part that fails (out of memory, a missing package) is reported and left. The table ends up
on stdout and in OUT/gpu.md.
"""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_levers
import gpu_parts
import gpu_training
import torch
from gpu_runs import freed

Rows = list[dict[str, Any]]


class TimeIsUp(Exception):
    """A part has used its share."""


@dataclass
class Bench:
    """What every part is handed.

    Attributes:
        device: "cuda" or "cpu".
        tiny: networks small enough for a test.
        out: folder of the results.
        until: time.monotonic() at which the whole run ends.
        facts: numbers that later parts need, e.g. the measured matrix rate.
        rows: the tables so far, by part.
        notes: lines below them.
    """

    device: str
    tiny: bool
    out: Path
    until: float
    facts: dict[str, float] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    part: str = ""

    def add(self, **row: Any) -> None:
        """One row of the current part's table, kept at once."""
        self.rows.setdefault(self.part, []).append(row)
        self.save()
        print(f"[{self.part}] " + ", ".join(f"{name} {shown(value)}" for name, value in row.items()), flush=True)

    def note(self, line: str) -> None:
        """A line below the tables, kept at once."""
        self.notes.append(line)
        self.save()
        print(f"[{self.part}] {line}", flush=True)

    def save(self) -> None:
        """Both files, whole or as they were."""
        found = {"facts": self.facts, "parts": self.rows, "notes": self.notes}
        for name, text in (("gpu.json", json.dumps(found, indent=1)), ("gpu.md", self.markdown())):
            (self.out / f"{name}.tmp").write_text(text, encoding="utf-8")
            (self.out / f"{name}.tmp").replace(self.out / name)

    def markdown(self) -> str:
        """All tables and notes."""
        lines: list[str] = []
        for part, rows in self.rows.items():
            columns = list(dict.fromkeys(name for row in rows for name in row))
            lines += [f"### {part}", "", f"| {' | '.join(columns)} |", "| " + "--- | " * len(columns)]
            lines += [f"| {' | '.join(shown(row.get(name, '')) for name in columns)} |" for row in rows] + [""]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes), ""])


def shown(value: Any) -> str:
    """A cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


@contextmanager
def time_box(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp in the main thread when the time is over."""

    def stop(*arguments: Any) -> None:
        raise TimeIsUp(f"stopped after its {seconds:.0f} s")

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


# name, most seconds it may take, function
PARTS: list[tuple[str, float, Callable[[Bench], None]]] = [
    ("machine", 30, gpu_parts.machine),
    ("correctness", 60, gpu_parts.correctness),
    ("edm", 80, gpu_parts.edm),
    ("sdxl", 240, gpu_parts.sdxl),
    ("one_card", 240, gpu_parts.one_card),
    ("profile", 60, gpu_parts.profile_steps),
    ("sd15", 100, gpu_parts.sd15),
    ("training", 210, gpu_training.training),
    ("precisions", 300, gpu_training.precisions),
    ("levers", 100, gpu_levers.levers),
    ("compiled", 150, gpu_levers.compiled),
]


def run_part(bench: Bench, name: str, seconds: float, part: Callable[[Bench], None]) -> None:
    """One part in its box; what goes wrong becomes a note."""
    left = bench.until - time.monotonic()
    bench.part = name
    if left < 5:
        bench.note(f"{name}: left out, the time was up")
        return
    started = time.monotonic()
    try:
        with freed(), time_box(min(seconds, left)):
            part(bench)
    except Exception as error:  # whatever it is, the rest goes on
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = traceback.extract_tb(error.__traceback__)[-1]
        bench.note(f"{name}: {type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {reason[:200]}")
        if not isinstance(error, TimeIsUp | torch.OutOfMemoryError):
            traceback.print_exc()
    print(f"[{name}] took {time.monotonic() - started:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> Bench:
    """Run the parts and print the tables."""
    names = [name for name, _, _ in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", default=names, choices=names)
    parser.add_argument(
        "--tiny", action="store_true", help="networks of a few thousand parameters, to try the script out"
    )
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("no CUDA device here; --tiny --device cpu tries the script out")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.device, options.tiny, options.out, time.monotonic() + 60 * options.minutes)
    for name, seconds, part in PARTS:
        if name in options.parts:
            run_part(bench, name, seconds, part)
    bench.save()
    print("\n" + bench.markdown())
    return bench


if __name__ == "__main__":
    sys.exit(0 if main().rows else 1)
