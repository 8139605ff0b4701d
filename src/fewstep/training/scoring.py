"""Scores of a run's checkpoints as they appear, beside its training: `fewstep evaluate --watch RUN`.

The run is only read; checkpoints are complete or absent, so none is read half-written. One that the run drops while it is
read is left out in a sentence. Figures stand in a file of their own, each with all its conditions, and none is made twice.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

from fewstep.devices import precision_of
from fewstep.errors import RunInterrupted, UserError, stopped_by
from fewstep.evaluation.evaluate import EvaluateOptions, Judge
from fewstep.evaluation.measure import NotPictures
from fewstep.evaluation.measurement import DISTANCE
from fewstep.evaluation.scores import SCORES, Score, differences, parse_scores
from fewstep.formats.atomic import replaced_file
from fewstep.formats.fingerprints import tensors_digest
from fewstep.formats.json_files import entry, read_json_object
from fewstep.formats.model_folder import CARD
from fewstep.formats.remote import is_url
from fewstep.models.model import Model
from fewstep.progress import Stderr, busy, say
from fewstep.training.checkpoint import Progress, checkpoint_step, list_checkpoints
from fewstep.training.checkpoint_models import CheckpointModels
from fewstep.training.run_folder import is_held

_OF_A_RUN = ("seed", "evaluations_per_image")  # what figures of one run share besides
POLL_SECONDS, SAY_SECONDS, PATIENCE_SECONDS = 2.0, 30.0, 120.0
console = Stderr()


def watch_run(source: str | Path, options: EvaluateOptions) -> None:
    """Score every checkpoint of a run once, its raw weights and their average, until the run ends.

    Writes the figures into `evaluation.json` of the run, or the file of `options.json_out`, and keeps the model with the lowest
    Frechet distance in the folder beside it whose name ends in `_best`. The same command goes on where it stopped.

    Raises:
        UserError: not a run folder; options that do not go together; figures of other conditions in the file; the run has died.
        RunInterrupted: Ctrl-C or SIGTERM.
    """
    if is_url(source):
        raise UserError(
            f"evaluate {source} --watch: a run is watched in a folder on a disk, not at a URL; give the folder that it works in, "
            "as `fewstep train` says when it begins"
        )
    run = Path(source).expanduser()
    if not (run / "settings.json").is_file():
        raise UserError(f"{run} is not a run folder: settings.json is not there; start the run first, then watch it")
    judge = Judge(options)
    figures = Figures(options.json_out or run / SCORES)
    precision = precision_of(options.precision, options.device, lambda line: say(console, line))
    with busy(console, f"Reading the run {run}"):
        models = CheckpointModels(run, device=options.device, precision=precision)
    try:
        Scoring(run, models, judge, figures).go_on()
    except KeyboardInterrupt as stop:
        name, code = stopped_by(stop)
        raise RunInterrupted(f"stopped by {name}; {figures.told()}", code) from None


class Figures:
    """The file of what was found, the best model beside it.

    Raises:
        UserError: the file is damaged or something else.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.scores, self._written = path, list[Score](), ""
        if not path.is_file():
            return
        try:
            self._written = path.read_text(encoding="utf-8")
            self.scores = parse_scores(json.loads(self._written))
            if not all(math.isfinite(score.step + score.found[DISTANCE]) for score in self.scores):
                raise ValueError("a figure without step or distance")
        except (OSError, ValueError, KeyError, RecursionError) as error:
            raise UserError(
                f"{path} has no figures of `fewstep evaluate --watch` ({error}); give another --json"
            ) from None

    @property
    def best_folder(self) -> Path:
        """Where the best model is kept."""
        return self.path.with_name(f"{self.path.stem}_best")

    def has(self, step: int, weights: str, digest: str) -> bool:
        """Whether these weights were measured.

        Raises:
            UserError: others were, after as many steps.
        """
        found = [score for score in self.scores if score.step == step and score.weights == weights]
        if any(score.digest not in ("", digest) for score in found):
            raise UserError(
                f"{self.path} has a figure of other {weights} weights after {step} steps than the run has now: it is of another run, or "
                "the run went back and on otherwise; give another --json, or move the file away"
            )
        return bool(found)

    def check(self, score: Score) -> None:
        """Refuse a figure that those which are noted cannot be compared with.

        Raises:
            UserError: those before were measured otherwise; something else has written into the file.
        """
        if self.path.is_file() and self.path.read_text(encoding="utf-8", errors="replace") != self._written:
            raise UserError(
                f"{self.path} was written by something else while the run was watched: end the other watch, or give another --json"
            )
        for earlier in self.scores:
            facts = [(name, getattr(earlier.found, name), getattr(score.found, name)) for name in _OF_A_RUN]
            if earlier.found.settings and score.found.settings:
                before, now = (one.found.settings.get("guidance_scale") for one in (earlier, score))
                facts.append(("guidance_scale", before, now))
            other = [*differences(earlier.found, score.found), *(fact for fact in facts if fact[1] != fact[2])]
            if other:
                name, before, now = other[0]
                raise UserError(
                    f"{self.path} has figures with {name.replace('_', ' ')} {before!r}, not {now!r}; "
                    "watch with the same options, or give another --json"
                )

    def is_best(self, score: Score) -> bool:
        """Whether a figure is lower than all that are noted."""
        return all(score.found[DISTANCE] < earlier.found[DISTANCE] for earlier in self.scores)

    def add(self, score: Score) -> None:
        """Note a figure.

        Raises:
            UserError: as `check`.
        """
        self.check(score)
        written = json.dumps([one.to_dict() for one in (*self.scores, score)], indent=1)
        with replaced_file(self.path) as aside:
            aside.write_text(written, encoding="utf-8")
        self.scores.append(score)
        self._written = written

    def told(self) -> str:
        """How many there are, and the best, as a part of a sentence."""
        if not self.scores:
            return "nothing was scored yet"
        best = min(self.scores, key=lambda score: score.found[DISTANCE])
        kept = f", kept in {self.best_folder}" * self.best_folder.is_dir()
        return (
            f"{len(self.scores)} figure{'s' * (len(self.scores) != 1)} in {self.path}, the best {best.found[DISTANCE]:.3f} after "
            f"{best.step:.0f} steps ({best.weights} weights){kept}{f'; each a PROXY of {best.found.protocol}' * bool(best.found.proxy)}"
        )


class Scoring:
    """The watching itself."""

    def __init__(self, run: Path, models: CheckpointModels, judge: Judge, figures: Figures) -> None:
        self.run, self.models, self.judge, self.figures = run, models, judge, figures
        self.finished: set[tuple[str, Any]] = set()  # scored or left out: a checkpoint's name, and what tells it apart
        self.place = _identity(run)
        self.said = self.seen = time.monotonic()
        self.sign: Any = None

    def go_on(self) -> None:
        """Until the run ends.

        Raises:
            UserError: it has died.
        """
        while True:
            self.refuse_another_place()
            found = [(path.name, _identity(path)) for path in list_checkpoints(self.run / "checkpoints")]
            new = [one for one in found if one not in self.finished and one[1]]
            if new:
                self.finished.add(new[0])
                self.score(self.run / "checkpoints" / new[0][0])
                continue
            if self.has_ended():
                say(console, f"{self.run} has ended; {self.figures.told()}")
                return
            self.refuse_if_dead()
            self.wait()

    def score(self, checkpoint: Path) -> None:
        """Score one checkpoint; one that is gone, or damaged, is left out in a sentence."""
        try:
            progress, models = self.models.read(checkpoint)
            for weights, model in models:
                digest = tensors_digest(model.denoiser.own_weights())[:16]
                if not self.figures.has(progress.step, weights, digest):
                    self.note(progress, weights, model, digest)
        except UserError as error:
            self.refuse_another_place()
            if checkpoint.is_dir() and str(checkpoint) not in str(error):
                raise
            gone = "the run dropped it before it was read; a larger run.keep_checkpoints leaves more time"
            say(console, f"{checkpoint.name} is left out: {error if checkpoint.is_dir() else gone}")
        self.seen = time.monotonic()

    def note(self, progress: Progress, weights: str, model: Model, digest: str) -> None:
        """Measure one model; one that makes no pictures is left out in a sentence."""
        name = f"{self.run}, step {progress.step}, {weights} weights"
        try:
            found = self.judge.figure(name, model)
        except NotPictures as error:
            say(console, f"{name}: left out, {error}")
            return
        assert found is not None
        self.refuse_another_place()
        print(found.sentence(), flush=True)
        for line in found.cautions() if not self.figures.scores else []:
            say(console, line)
        score = Score(progress.step, progress.seconds, weights, found, digest)
        folder = self.figures.best_folder / self.models.role
        self.figures.check(score)
        if is_best := self.figures.is_best(score):
            model.write(folder)  # before its figure: a watch that is killed between the two measures it again
        self.figures.add(score)
        if is_best:
            say(console, f"the best so far, kept in {folder}")

    def has_ended(self) -> bool:
        """Whether the run's result is there, is that of its last checkpoint, and nobody trains on."""
        folder, checkpoints = self.run / self.models.role, list_checkpoints(self.run / "checkpoints")
        if not folder.is_dir() or not checkpoints or is_held(self.run):
            return False
        path, remedy = folder / CARD, "let the run end again"
        made_with = entry(read_json_object(path, remedy), "made_with", dict, path, remedy)
        return int(made_with.get("num_steps", 0)) >= checkpoint_step(checkpoints[-1])

    def refuse_another_place(self) -> None:
        """Raise UserError where the folder is not the one that the watch began with."""
        now = _identity(self.run)
        if now == self.place:
            return
        what = "is another folder than when the watch began" if now else "is gone: it was moved or deleted"
        told = f"; {self.figures.told()}" * self.figures.path.is_file()
        raise UserError(f"{self.run} {what}; watch the run where it is now{told}")

    def refuse_if_dead(self) -> None:
        """Raise UserError where no process trains and nothing was written for a while."""
        sign = [(path.name, path.stat().st_mtime_ns) for path in sorted(self.run.glob("*.jsonl"))]
        if sign != self.sign:
            self.sign, self.seen = sign, time.monotonic()
        if time.monotonic() - self.seen >= PATIENCE_SECONDS and not is_held(self.run):
            raise UserError(
                f"{self.run} is not finished and nobody trains there: nothing was written for {PATIENCE_SECONDS:.0f} seconds; "
                f"continue it with `fewstep train` and watch again; {self.figures.told()}"
            )

    def wait(self) -> None:
        """A moment; says twice a minute for what."""
        if time.monotonic() - self.said >= SAY_SECONDS:
            self.said = time.monotonic()
            last = max((name for name, _ in self.finished), default="")
            after = f"after {last}" if last else "the first one"
            say(console, f"waiting for the next checkpoint of {self.run}, {after}")
        time.sleep(POLL_SECONDS)


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file or folder from another one that lay, or lies, under its name; None where nothing is there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
