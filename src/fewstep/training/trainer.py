"""The loop, and only the loop: every kind of training is a job that this file steps, logs, samples and saves."""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from fewstep.data.waiting import WAITING
from fewstep.errors import RunInterrupted, UserError, disk_error
from fewstep.formats.atomic import remove_leftovers
from fewstep.parallel import agreed, gathered, is_first, wait_for_all, world_size
from fewstep.progress import Stderr, duration, every, say
from fewstep.settings import PretrainSettings, TrainSettings
from fewstep.shared_work import by_the_first
from fewstep.training.checkpoint import (
    list_checkpoints,
    random_state,
    read_checkpoint,
    read_progress,
    restore_random_state,
)
from fewstep.training.interruption import Interruption
from fewstep.training.remote_run import RemoteRun
from fewstep.training.run_folder import hold, release
from fewstep.training.run_log import Clock, RunLog
from fewstep.training.saving import Saver

SAVE_AFTER_SECONDS, SAVING_SHARE = 60.0, 0.02  # of training without a checkpoint, and what saving may take of a run
LEFT_AFTER_SECONDS = 10.0  # of a session before it says how long the rest takes
PLAIN_EVERY_SECONDS = 30  # between lines about a run's progress where there is no terminal
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
    first_step_shows: bool
    """Whether there is something to see after the first step; an untrained teacher shows noise."""
    class_names: Sequence[str]
    """Of the data that are trained on; a checkpoint says them. Empty where the teacher knows better."""

    def step(self, step: int, progress: float) -> dict[str, Tensor]:
        """Make training step `step` (from 0) at `progress` in 0..1; returns scalar metrics on the device."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything an exact continuation needs."""

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `tensors`."""

    def layout(self) -> dict[str, Tensor]:
        """Tensors that lie in the processes as those of these names will in `tensors`."""

    def pictures(self, log: RunLog, step: int) -> None:
        """Write sample pictures after `step` finished steps."""

    def save_result(self, folder: Path, num_steps: int) -> Path:
        """Write the finished model below the run folder; returns where."""


def run_job(
    job: Job, settings: TrainSettings | PretrainSettings, folder: Path, *,
    watches: Sequence[Watcher] = (), observers: tuple[Observer, ...] = (), console: Console | None = None,
    remote: RemoteRun | None = None,
) -> Path:  # fmt: skip
    """Train until `training.num_steps` or the time limit, continuing from the newest checkpoint of the folder.

    Args:
        job: built from `settings`.
        folder: run folder (see `claim_run_folder`).
        watches: measure the model in training, now and then.
        observers: called with (finished steps, training seconds) after every step, off the training clock.
        remote: where the folder is copied after each checkpoint and at the end.

    Returns:
        Folder of the finished model.

    Raises:
        UserError: a non-finite metric, a full disk, a damaged checkpoint, another process in the folder.
        RunInterrupted: Ctrl-C or SIGTERM; a checkpoint is saved. A second Ctrl-C ends at once.
    """
    console = console or Stderr()
    hold(folder)
    try:
        with Interruption() as stop:
            loop = Loop(job, settings, folder, console, stop, remote)
            try:
                step = loop.run(watches, observers)
            except Exception:
                with suppress(UserError):  # a checkpoint that is being written is finished
                    loop.saver.finish()
                raise
        result = job.save_result(folder, step)
        if remote is not None:
            by_the_first(remote.push)
        return result
    except OSError as error:  # of the disk, wherever in a run: its log, TensorBoard's thread, our own clean-up
        if told := disk_error(error, folder):
            raise told from error
        raise
    finally:
        release(folder)


class Loop:
    """One session of a run."""

    def __init__(
        self, job: Job, settings: TrainSettings | PretrainSettings, folder: Path, console: Console, stop: Interruption,
        remote: RemoteRun | None,
    ) -> None:  # fmt: skip
        self.job, self.settings, self.folder, self.console, self.stop = job, settings, folder, console, stop
        self.step, elapsed = resume(job, folder)
        self.saved_step = self.step
        self.saver = Saver(folder / "checkpoints", settings.run.keep_checkpoints, remote)
        self.log = RunLog(folder, self.step, find_spec("tensorboard") is not None, console)
        self.clock = Clock(elapsed)
        self.clock.pause()
        self.saved_seconds = elapsed
        self.rate = Rate(settings.training.batch_size, elapsed)

    def run(self, watches: Sequence[Watcher], observers: Sequence[Observer]) -> int:
        """Make steps until the end; returns how many there are.

        Raises:
            RunInterrupted: Ctrl-C or SIGTERM; the run is saved.
        """
        with closing(self.log), Bar(self.job.phase, self.console, self.log) as bar:
            bar.show(self.progress(), "begins" if not self.step else f"goes on after step {self.step}")
            for watch in watches:
                self.stop.at_once(partial(watch.resume, self.step, self.clock.seconds()))
            bar.say(self.progress(), f"step {self.step + 1}, the first one of this session")
            while self.goes_on():
                self.one_step(bar)
                due: list[Observer] = [*watches, *observers]
                seconds = agreed(self.clock.seconds())
                for observe in due:
                    self.stop.at_once(partial(observe, self.step, seconds))
            if not self.stop.signal and self.step != self.saved_step:
                bar.say(self.progress(), "last sample pictures")
                self.job.pictures(self.log, self.step)
            if self.step != self.saved_step:
                self.save()
            self.saver.finish()
            if self.stop.signal:
                self.log.say(self.farewell())
                raise RunInterrupted(self.farewell(), 128 + self.stop.signal)
            bar.done(f"step {self.step}, done")
        return self.step

    def one_step(self, bar: "Bar") -> None:
        """One training step on the clock, and what is due after it off the clock."""
        run, log = self.settings.run, self.log
        began, waited = self.clock.seconds(), WAITING.seconds
        self.clock.resume()
        progress, late = agreed((self.progress(), self.is_late()))  # rates may follow the clock
        metrics = self.job.step(self.step, progress)
        self.step += 1
        seconds = self.clock.seconds()
        self.rate.count(seconds)
        speed = self.rate.images_per_second
        share = min(1.0, (WAITING.seconds - waited) / max(seconds - began, 1e-9))
        log.add(self.step - 1, metrics, {"images_per_second": speed, "seconds": seconds, "data_wait_share": share})
        self.clock.pause()
        done = self.progress()
        bar.show(done, f"step {self.step}, {speed:.0f} images/s")
        if self.step % run.log_every == 0:
            log.add(self.step - 1, {}, {"peak_memory_gib": peak_memory_gib()})
            log.flush()
        if self.step % run.sample_every == 0 or (self.step == 1 and self.job.first_step_shows):
            bar.say(done, f"step {self.step}, sample pictures")
            self.job.pictures(log, self.step)
            bar.show(done, f"step {self.step}, {speed:.0f} images/s")
        if late or self.step % run.checkpoint_every == 0:
            self.save()

    def goes_on(self) -> bool:
        """Whether another step is made: not all are, the time is not up, and no process was asked to stop.

        Processes decide together, by the first one's clock.

        Raises:
            UserError: a checkpoint could not be written.
        """
        limit = self.settings.training.time_limit_minutes * 60
        over = self.step >= self.settings.training.num_steps or bool(limit and self.clock.seconds() >= limit)
        heard = gathered((over, self.stop.signal, self.saver.failed))
        if any(failed for _, _, failed in heard):
            self.saver.finish()
        if world_size() > 1:
            self.stop.signal = next((signal for _, signal, _ in heard if signal is not None), None)
        return not (heard[0][0] or self.stop.signal)

    def is_late(self) -> bool:
        """Whether a checkpoint is due by time: a minute after the last one, later where saving takes long."""
        return self.clock.seconds() - self.saved_seconds >= max(SAVE_AFTER_SECONDS, self.saver.seconds / SAVING_SHARE)

    def progress(self) -> float:
        """Share of the run that is done, 0..1: by steps or by the clock, whichever is nearer its end."""
        training = self.settings.training
        limit = training.time_limit_minutes * 60
        return min(1.0, max(self.step / training.num_steps, self.clock.seconds() / limit if limit else 0.0))

    def save(self) -> None:
        """Begin to write a checkpoint."""
        self.log.flush()
        training = self.settings.training
        state = {
            "phase": self.job.phase, "elapsed_seconds": self.clock.seconds(),
            "data_position": self.step * training.batch_size,
            "draws": {"generator": "philox4x32-10", "seed": training.seed}, "class_names": list(self.job.class_names),
        }  # fmt: skip
        self.saver.start(self.step, {**self.job.tensors(), **random_state()}, state)
        self.saved_step, self.saved_seconds = self.step, self.clock.seconds()

    def farewell(self) -> str:
        """What a user who stopped the run wants to know."""
        checkpoints = list_checkpoints(self.folder / "checkpoints")
        kept = f"everything is saved in {checkpoints[-1]}" if checkpoints else "nothing was trained yet"
        return f"stopped by {self.stop.name} after {self.step} steps; {kept}"


class Bar:
    """How far a run is: a bar in a terminal, a plain line every half minute elsewhere, also while a step takes longer; those
    lines are in `log.txt` too."""

    def __init__(self, phase: str, console: Console, log: RunLog) -> None:
        self.phase, self.console, self.log = phase, console, log
        self._bar = _progress(console)
        self._beat = every(PLAIN_EVERY_SECONDS, self._still)
        self._state, self._told = "", 0.0
        self._begun: tuple[float, float] | None = None

    def __enter__(self) -> "Bar":
        self._bar.__enter__()
        self._task = self._bar.add_task(self.phase, total=1.0, rate="")
        self._beat.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._beat.__exit__(*error)
        self._bar.__exit__(*error)

    def show(self, progress: float, what: str) -> None:
        """`progress` in 0..1 and what is being done; a line where the last one is half a minute old."""
        self._bar.update(self._task, completed=progress, rate=what)
        self._state = f"{what} ({progress:.0%}{self._left(progress)})"
        if time.monotonic() - self._told >= PLAIN_EVERY_SECONDS:
            self._tell(self._state)

    def _left(self, progress: float) -> str:
        """The time that the rest would take if it went on as since this session began; nothing while that says little."""
        now = time.monotonic()
        if self._begun is None:
            self._begun = now, progress
        made = progress - self._begun[1]
        if made < 0.01 or progress >= 1 or now - self._begun[0] < LEFT_AFTER_SECONDS:
            return ""
        return f", {duration((now - self._begun[0]) * (1 - progress) / made)} left"

    def done(self, what: str) -> None:
        """The end of the run: a line in any case."""
        self._bar.update(self._task, completed=1.0, rate=what)
        self._tell(f"{what} (100%)")

    def say(self, progress: float, what: str) -> None:
        """The same for what may take a while: a line in any case."""
        self._bar.update(self._task, completed=progress, rate=what)
        self._state = f"{what} ({progress:.0%})"
        self._tell(f"{self._state} ...")

    def _still(self) -> None:
        """The work that was last named goes on."""
        if time.monotonic() - self._told >= PLAIN_EVERY_SECONDS:
            self._tell(f"{self._state}, still at it")

    def _tell(self, what: str) -> None:
        self._told = time.monotonic()
        line = f"{self.phase}: {what}"
        self.log.say(line)
        if not self.console.is_terminal:
            say(self.console, line)


def resume(job: Job, folder: Path) -> tuple[int, float]:
    """Restore the newest checkpoint; returns (finished steps, training seconds), (0, 0) without one."""
    if is_first():
        remove_leftovers(folder / "checkpoints")
    wait_for_all("the run's last checkpoint is read")
    checkpoints = list_checkpoints(folder / "checkpoints")
    if not checkpoints:
        return 0, 0.0
    path = checkpoints[-1]
    tensors, state = read_checkpoint(path, {**job.layout(), **random_state()} if world_size() > 1 else None)
    found = read_progress(path, state)
    if found.phase != job.phase:
        raise UserError(
            f"{folder} holds a run of phase {found.phase!r}, this is {job.phase!r}; choose another run.folder"
        )
    if found.class_names and job.class_names and found.class_names != tuple(job.class_names):
        raise UserError(
            f"{folder} began with the classes {', '.join(found.class_names[:12])} in this order, the pictures now have "
            f"{', '.join(job.class_names[:12])}: their numbers would change; choose another run.folder"
        )
    job.restore(tensors)
    restore_random_state(path, tensors)
    return found.step, found.seconds


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
        TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal,
    )  # fmt: skip
