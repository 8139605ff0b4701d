"""Two short trainings through the command a user types: the class and the text quick start, on the GPU in bf16."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MINUTES = 1.0


def training(bench: Any) -> None:
    """Both quick starts, each in a process of its own; their pages come along."""
    for command, page in (("quickstart", "quickstart.html"), ("text-quickstart", "text-quickstart.html")):
        left = bench.until - time.monotonic()
        minutes = 0.02 if bench.tiny else min(MINUTES, (left / 60 - 0.5) / 2)
        if minutes <= 0:
            bench.note(f"{command}: left out, the time was up")
            continue
        with tempfile.TemporaryDirectory() as place:
            _train(bench, command, minutes, Path(place) / "run", page)


def _train(bench: Any, command: str, minutes: float, folder: Path, page: str) -> None:
    started = time.monotonic()
    ready = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "150"}
    done = subprocess.run(
        [sys.executable, "-m", "fewstep", command, "--minutes", f"{minutes:.2f}", "--folder", str(folder)],
        env=os.environ | ready, capture_output=True, text=True, timeout=max(10.0, bench.until - time.monotonic() - 3),
    )  # fmt: skip
    if done.returncode:
        bench.note(f"{command}: failed ({done.returncode}): {done.stderr.strip()[-600:]}")
        return
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures: dict[str, Any] = json.loads((folder / "report.json").read_text())
    distances = {
        f"{role} Frechet distance": (figures[role].get("trained") or figures[role]).get("frechet_distance")
        for role in ("teacher", "generator")
    }
    bench.add(
        command=command, minutes=minutes, steps=rows[-1].get("step", len(rows)) if rows else 0, **distances,
        **{"seconds in all": time.monotonic() - started},
    )  # fmt: skip
    if (folder / "report.html").is_file():
        shutil.copy(folder / "report.html", bench.out / page)
