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

import fewstep

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


ASSETS = Path(fewstep.__file__).parent / "assets"
CLASSES = [str(ASSETS / "fashion-mnist/recipe.toml"), f"data.images={ASSETS / 'fashion-mnist/train.parquet'}"]
ONE_STEP = str(Path(__file__).parents[1] / "recipes/emoji_dmd2_1step.toml")
# name, recipe and changes, steps, what measures it
RUNS: list[tuple[str, list[str], int, str]] = [
    *((f"classes, two steps, {precision}", [*CLASSES, f"compute.precision={precision}"], 600, "fashion-mnist")
      for precision in ("bf16", "fp16")),
    *((f"text, LoRA of four steps, {precision}", [str(ASSETS / "emoji/recipe.toml"), f"compute.precision={precision}"], 240, "emoji")
      for precision in ("bf16", "fp16")),
    ("text, one step, bf16", [ONE_STEP, "compute.precision=bf16"], 1500, "emoji"),
]  # fmt: skip


def precisions(bench: Any) -> None:
    """The quick starts' recipes in bf16 and in fp16, and text in one step: equal steps, side by side on the device, then measured."""
    with tempfile.TemporaryDirectory() as place:
        running = []
        for number, (name, words, steps, judge) in enumerate(RUNS):
            folder = Path(place) / str(number)
            changes = [f"training.num_steps={2 if bench.tiny else steps}", "training.time_limit_minutes=0", f"run.folder={folder}",
                       f"compute.device={bench.device.split(':')[0]}", "run.samples=[1000000,20]", "best.files=[]"]  # fmt: skip
            if bench.tiny:
                changes += ["training.batch_size=2", "compute.precision=fp32"]
            started = time.monotonic()
            with (bench.out / f"precisions_{number}.log").open(
                "w", encoding="utf-8"
            ) as log:  # the process keeps its own
                training = subprocess.Popen(
                    [sys.executable, "-m", "fewstep", "train", *words, *changes],
                    env=_environment(),
                    stdout=log,
                    stderr=log,
                )
            running.append((name, judge, folder, training, started))
        try:
            for name, judge, folder, training, started in running:
                code = training.wait(timeout=max(10.0, bench.until - time.monotonic() - 60))
                seconds = time.monotonic() - started
                if code:
                    bench.note(f"{name}: failed ({code}); see its log")
                    continue
                _measure(bench, name, judge, folder, seconds)
        finally:
            for *_, training, _ in running:
                training.kill()


def _environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "150"}


def _measure(bench: Any, name: str, judge: str, folder: Path, seconds: float) -> None:
    """A row: the Frechet distance of 5,000 pictures, or 1,000 from texts, and what was skipped in fp16."""
    found = folder / "figure.json"
    count = 8 if bench.tiny else 5000 if judge == "fashion-mnist" else 1000
    words = ["--features", f"bundled:{judge}", "--reference", str(ASSETS / judge / "reference_train.npz")]
    words += ["--prompts", str(ASSETS / judge / "prompts_train.txt")] if judge == "emoji" else []
    done = subprocess.run(
        [sys.executable, "-m", "fewstep", "evaluate", str(folder), *words, "--num-images", str(count), "--json", str(found),
         "--device", bench.device.split(":")[0], "--precision", "fp32"],
        env=_environment(), capture_output=True, text=True, timeout=max(10.0, bench.until - time.monotonic() - 3),
    )  # fmt: skip
    if done.returncode:
        bench.note(f"{name}: not measured ({done.returncode}): {done.stderr.strip()[-400:]}")
        return
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    norms = [row[key] for row in rows for key in row if key.endswith("_grad_norm")]
    bench.add(
        run=name, steps=max(row["step"] for row in rows) + 1, **{"seconds beside the others": seconds},
        **{"Frechet distance": json.loads(found.read_text())["frechet_distance"], "images": count},
        **{"updates skipped for overflows": sum(norm == 0 for norm in norms), "updates": len(norms)},
    )  # fmt: skip
    grids = sorted((folder / "samples").glob("generator_*.png"))
    if grids:
        shutil.copy(grids[-1], bench.out / f"precisions_{judge}_{len(bench.rows[bench.part])}.png")
