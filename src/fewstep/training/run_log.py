"""What a run writes while it goes: metrics as JSON lines, TensorBoard events, sample pictures, the resolved settings.

Metrics stay on the device until `flush`, so a training step never waits for them. `flush` is also where a
non-finite value stops the run.
"""

import json
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.atomic import replaced_file
from fewstep.formats.json_files import parse_json
from fewstep.formats.pixels import make_grid, save_grid
from fewstep.parallel import is_first
from fewstep.progress import Stderr, say
from fewstep.training.health import SampleStatistics, alarms
from fewstep.training.tracker import Tracker, tracker_of

REFERENCE = "teacher_statistics.json"
STATISTICS = "sample_statistics.jsonl"


_AT_ONCE = "; in the first step the weights that it starts with may be damaged, the teacher's among them"


class NonFiniteError(UserError):
    """A loss or gradient norm became infinite or NaN."""


class RunLog:
    """Metrics and pictures below one run folder; of many processes the first writes, the others only notice faults.

    Args:
        folder: run folder, made if missing.
        start_step: steps already done; later lines of an interrupted run are cut away.
        tensorboard: also write event files under `tensorboard/`.
    """

    def __init__(self, folder: Path, start_step: int, tensorboard: bool, console: Console | None = None) -> None:
        self.folder = folder
        self._pending: list[tuple[int, dict[str, Tensor], dict[str, float]]] = []
        self._path = folder / "metrics.jsonl"
        self.console = console or Stderr()
        self._writer: Any = None
        self._tracker: Tracker | None = None
        self._writes = is_first()
        if not self._writes:
            return
        self._tracker = tracker_of(folder)
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        _cut_metrics(self._path, start_step)
        for name in ("alarms.jsonl", STATISTICS):
            _cut_metrics(folder / name, start_step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)

    def add(self, step: int, metrics: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Keep one step's metrics: scalar tensors on any device, and plain numbers."""
        self._pending.append((step, metrics, numbers))

    def flush(self) -> dict[str, float]:
        """Bring the pending metrics to the host in one copy, write them, return the last line's values.

        Raises:
            NonFiniteError: a metric is not finite; names the metric and the step. The lines are written first.
        """
        if not self._pending:
            return {}
        flat = [value.detach().float().reshape(()) for _, metrics, _ in self._pending for value in metrics.values()]
        values = iter(torch.stack(flat).tolist() if flat else [])
        lines: list[dict[str, float]] = []
        for step, metrics, numbers in self._pending:
            lines.append({"step": step, **{name: next(values) for name in metrics}, **numbers})
        self._pending = []
        if self._writes:
            self._write(lines)
        if self._writer is not None:
            for line in lines:
                for name, value in line.items():
                    self._writer.add_scalar(name, value, int(line["step"]))
        if self._tracker is not None:
            for line in lines:
                self._tracker.numbers(
                    int(line["step"]), {name: value for name, value in line.items() if name != "step"}
                )
        for line in lines:
            for name, value in line.items():
                if not np.isfinite(value):
                    raise NonFiniteError(
                        f"{name} became {value} at step {int(line['step'])}: the run stopped and the last good "
                        f"checkpoint in {self.folder / 'checkpoints'} is kept. Lower the learning rates "
                        "(optimizer.*), or set compute.precision=fp32, and repeat the command to continue from it"
                        + _AT_ONCE
                        * (line["step"] == 0)
                    )
        return lines[-1]

    def _write(self, lines: list[dict[str, float]]) -> None:
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error}; free some space, then repeat the command") from error

    def picture(self, name: str, step: int, images: Tensor, columns: int) -> Path:
        """Save a grid of images (N, C, H, W) in [-1, 1] as samples/<name>_<step>.png."""
        path = self.folder / "samples" / f"{name}_{step:08d}.png"
        if not self._writes:
            return path
        save_grid(path, images, columns)
        if self._writer is not None:
            self._writer.add_image(name, np.asarray(make_grid(images, columns)), step, dataformats="HWC")
        if self._tracker is not None:
            self.flush()  # what comes after it may not belong to an earlier step
            self._tracker.picture(name, step, path)
        return path

    def note(self, name: str, lines: list[str]) -> None:
        """Write lines of text beside the pictures they belong to, as samples/<name>.txt."""
        if not self._writes:
            return
        with replaced_file(self.folder / "samples" / f"{name}.txt") as aside:
            aside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def keep_reference(self, statistics: SampleStatistics) -> None:
        """Remember the teacher's sample statistics for the rest of the run, also over interruptions."""
        if not self._writes:
            return
        with replaced_file(self.folder / REFERENCE) as aside:
            aside.write_text(json.dumps(statistics.to_dict(), indent=1), encoding="utf-8")

    def samples(self, step: int, found: SampleStatistics) -> list[str]:
        """Write the generator's sample statistics to `sample_statistics.jsonl`; returns alarms where they are far from the teacher's.

        Alarms also go to `alarms.jsonl`. They never stop a run.
        """
        if not self._writes:
            return []
        with open(self.folder / STATISTICS, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step - 1, **found.to_dict()}) + "\n")
        if self._writer is not None:
            for name, value in found.to_dict().items():
                self._writer.add_scalar(f"samples_{name}", value, step - 1)
        path = self.folder / REFERENCE
        if step == 1 or not path.is_file():  # the first grid shows a generator that has not been trained
            return []
        try:
            teacher = SampleStatistics(**parse_json(path.read_text(encoding="utf-8")))
            sentences = alarms(found, teacher)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it") from None
        with open(self.folder / "alarms.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step - 1, "alarm": sentence}) + "\n" for sentence in sentences)
        for sentence in sentences:
            say_in_run(self.folder, self.console, f"warning: step {step}: {sentence}")
        return sentences

    def say(self, line: str) -> None:
        """Add a line of words to `log.txt`, with the time."""
        log_line(self.folder, line)

    def close(self) -> None:
        """Close the event file and the tracker's run."""
        if self._writer is not None:
            self._writer.close()
        if self._tracker is not None:
            self._tracker.close()


def log_line(folder: Path, line: str) -> None:
    """Add a line of words to the run's `log.txt`, with the time; of many processes the first does."""
    if not is_first():
        return
    with suppress(OSError), open(folder / "log.txt", "a", encoding="utf-8") as file:  # full disks: see `RunLog.flush`
        file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")


def say_in_run(folder: Path, console: Console, line: str) -> None:
    """Tell people a line about a run that has begun, which its `log.txt` keeps."""
    log_line(folder, line)
    say(console, line)


def _cut_metrics(path: Path, start_step: int) -> None:
    """Drop lines of steps that will be made again, and a line cut short by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] < start_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            continue
    with replaced_file(path) as aside:
        aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


class Clock:
    """Training time in seconds over all sessions of a run, without pauses for pictures and checkpoints."""

    def __init__(self, elapsed_seconds: float = 0.0) -> None:
        self._before, self._started = elapsed_seconds, time.perf_counter()
        self._running = True

    def seconds(self) -> float:
        """Seconds so far."""
        return self._before + (time.perf_counter() - self._started if self._running else 0.0)

    def pause(self) -> None:
        """Stop counting."""
        self._before, self._running = self.seconds(), False

    def resume(self) -> None:
        """Count again."""
        self._started, self._running = time.perf_counter(), True
