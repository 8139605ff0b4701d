"""The loop, and only the loop: every kind of training is a job that this file steps, logs, samples and saves."""

import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.atomic import remove_leftovers, replaced_file
from fewstep.settings import PretrainSettings, TrainSettings, flatten_settings, parse_settings
from fewstep.training.checkpoint import (
    list_checkpoints,
    random_state,
    read_checkpoint,
    restore_random_state,
    write_checkpoint,
)
from fewstep.training.run_log import Clock, RunLog

EMBEDDINGS = "embeddings"  # folder of stored text embeddings, made before the run claims its folder
Observer = Callable[[int, float], None]


class Watcher(Protocol):
    """Measures while training (see `training.watch`)."""

    def resume(self, step: int, seconds: float) -> None:
        """A run begins or goes on after `step` finished steps."""

    def __call__(self, step: int, seconds: float) -> None:
        """One more step is finished; called off the training clock."""


class Job(Protocol):
    """What the loop needs of a kind of training."""

    phase: str

    def step(self, step: int, progress: float) -> dict[str, Tensor]:
        """Make training step `step` (from 0) at `progress` in 0..1; returns scalar metrics on the device."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything an exact continuation needs."""

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `tensors`."""

    def pictures(self, log: RunLog, step: int) -> None:
        """Write sample pictures after `step` finished steps."""

    def save_result(self, folder: Path, num_steps: int) -> Path:
        """Write the finished model below the run folder; returns where."""


def run_job(
    job: Job, settings: TrainSettings | PretrainSettings, folder: Path, *,
    watches: Sequence[Watcher] = (), observers: tuple[Observer, ...] = (), console: Console | None = None,
) -> Path:  # fmt: skip
    """Train until `training.num_steps` or the time limit, continuing from the newest checkpoint of the folder.

    Args:
        job: built from `settings`.
        folder: run folder (see `claim_run_folder`).
        watches: measure the model in training, now and then.
        observers: called with (finished steps, training seconds) after every step, off the training clock.

    Returns:
        Folder of the finished model.

    Raises:
        UserError: a non-finite metric, a full disk, a damaged checkpoint.
    """
    console = console or Console(stderr=True)
    training, run = settings.training, settings.run
    step, elapsed = resume(job, folder)
    log = RunLog(folder, step, run.tensorboard, console)
    clock = Clock(elapsed)
    limit_seconds = training.time_limit_minutes * 60
    saved_step = step
    clock.pause()
    for watch in watches:
        watch.resume(step, clock.seconds())
    clock.resume()

    def save() -> None:
        nonlocal saved_step
        log.flush()
        state = {
            "phase": job.phase, "elapsed_seconds": clock.seconds(), "data_position": step * training.batch_size,
            "draws": {"generator": "philox4x32-10", "seed": training.seed},
        }  # fmt: skip
        write_checkpoint(folder / "checkpoints", step, {**job.tensors(), **random_state()}, state, run.keep_checkpoints)
        saved_step = step

    with closing(log), _progress(console) as bar:
        task = bar.add_task(job.phase, total=1.0, rate="")
        rate = Rate(training.batch_size, elapsed)
        while step < training.num_steps and not (limit_seconds and clock.seconds() >= limit_seconds):
            progress = max(step / training.num_steps, clock.seconds() / limit_seconds if limit_seconds else 0.0)
            metrics = job.step(step, progress)
            step += 1
            rate.count(clock.seconds())
            log.add(step - 1, metrics, {"images_per_second": rate.images_per_second, "seconds": clock.seconds()})
            bar.update(task, completed=progress, rate=f"step {step}, {rate.images_per_second:.0f} images/s")
            clock.pause()
            if step % run.log_every == 0:
                log.add(step - 1, {}, {"peak_memory_gib": peak_memory_gib()})
                log.flush()
            if step % run.sample_every == 0 or step == 1:
                job.pictures(log, step)
            if step % run.checkpoint_every == 0:
                save()
            for watch in watches:
                watch(step, clock.seconds())
            for observer in observers:
                observer(step, clock.seconds())
            clock.resume()
        bar.update(task, completed=1.0)
        clock.pause()
        if step != saved_step:
            job.pictures(log, step)
            save()
    return job.save_result(folder, step)


def resume(job: Job, folder: Path) -> tuple[int, float]:
    """Restore the newest checkpoint; returns (finished steps, training seconds), (0, 0) without one."""
    remove_leftovers(folder / "checkpoints")
    checkpoints = list_checkpoints(folder / "checkpoints")
    if not checkpoints:
        return 0, 0.0
    tensors, state = read_checkpoint(checkpoints[-1])
    if state["phase"] != job.phase:
        raise UserError(
            f"{folder} holds a run of phase {state['phase']!r}, this is {job.phase!r}; choose another run.folder"
        )
    job.restore(tensors)
    restore_random_state(tensors)
    return int(state["step"]), float(state["elapsed_seconds"])


def claim_run_folder(settings: TrainSettings | PretrainSettings, folder: Path) -> None:
    """Write the resolved settings into a new run folder, or check that an existing one has the same.

    The number of steps, the time limit, `optimizer.*`, `compute.*` and `run.*` may change between sessions of one run;
    bit-identical continuation is promised when they do not.

    Raises:
        UserError: the folder holds a run of other settings (they are named) or cannot be written.
    """
    path = folder / "settings.json"
    if path.exists():
        try:
            earlier = parse_settings(type(settings), _read_json(path), str(path))
        except UserError as error:
            raise UserError(
                f"{folder} holds a run of another kind or version ({error}); choose another run.folder"
            ) from None
        before, now = flatten_settings(earlier), flatten_settings(settings)
        free = (
            "run.",
            "best.",
            "optimizer.",
            "compute.",
            "training.num_steps",
            "training.time_limit_minutes",
            "training.microbatch_size",
            "expected",
        )
        changed = [key for key in now if before[key] != now[key] and not key.startswith(free)]
        if changed:
            pairs = ", ".join(f"{key} was {before[key]!r}, is {now[key]!r}" for key in changed[:5])
            raise UserError(
                f"{folder} holds a run of other settings: {pairs}; set them back or choose another run.folder"
            )
    elif folder.exists() and (not folder.is_dir() or any(path.name != EMBEDDINGS for path in folder.iterdir())):
        raise UserError(f"{folder} is not empty and no run of fewstep; choose another run.folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make run folder {folder}: {error}; choose another run.folder") from error
    with replaced_file(path) as aside:
        aside.write_text(settings.model_dump_json(indent=1), encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    import json

    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); choose another run.folder") from None


class Rate:
    """Images a second over the last steps."""

    def __init__(self, batch_size: int, start_seconds: float = 0.0, window: int = 20) -> None:
        self.batch_size, self.window, self._times = batch_size, window, [start_seconds]
        self.images_per_second = 0.0

    def count(self, seconds: float) -> None:
        """One step finished at `seconds` of training time."""
        self._times = [*self._times[-self.window :], seconds]
        spent = self._times[-1] - self._times[0]
        self.images_per_second = (len(self._times) - 1) * self.batch_size / spent if spent > 0 else 0.0


def peak_memory_gib() -> float:
    """Peak memory of this process so far: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    kilo = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilo / 2**20 if sys.platform != "darwin" else kilo / 2**30


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console,
    )  # fmt: skip
