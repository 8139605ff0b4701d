"""`fewstep bench-inference`: how long pictures take in a generator and in its teacher, alone and many at once."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fewstep import __version__
from fewstep.devices import compile_denoiser, precision_of
from fewstep.errors import UserError
from fewstep.evaluation.asked import refuse_no_place
from fewstep.formats.atomic import replaced_file
from fewstep.models.load import load_model
from fewstep.models.model import Model
from fewstep.progress import Stderr, busy, say, working

LEAST_ROUNDS, MOST_ROUNDS = 2, 1000


@dataclass(frozen=True)
class SpeedOptions:
    """The options of `fewstep bench-inference`, as its help says."""

    teacher: str = ""
    batch_sizes: str = "1,8,64"
    prompt: str = ""
    seconds: float = 5.0
    compile: bool = False
    json_out: Path | None = None
    device: str = "auto"
    precision: str = "auto"


@dataclass(frozen=True)
class Timing:
    """Pictures of one model made at once.

    Attributes:
        model: "generator", "generator, compiled" or "teacher".
        seconds: from the call to pictures on the CPU, the median of `rounds`; text encoding is included.
        decoding: of these, seconds of the decoder; 0 where the network makes pixels.
        images_per_second: batch_size / seconds.
        ratio: the teacher's seconds over these; 1 for the teacher itself.
    """

    model: str
    batch_size: int
    evaluations: int
    seconds: float
    decoding: float
    rounds: int
    images_per_second: float
    ratio: float = 1.0


def bench_inference(source: str, options: SpeedOptions) -> list[Timing]:
    """Time a generator and its teacher on the same machine, one after the other at each batch size, and print a table.

    Raises:
        UserError: no generator, an unknown teacher, a batch size that is none, a prompt for classes, no compiler.
    """
    console, sizes = Stderr(), _batch_sizes(options.batch_sizes)
    refuse_no_place("--json", options.json_out)
    if not options.seconds > 0:
        raise UserError(f"--seconds {options.seconds:g}: measuring takes more than 0 seconds")
    precision = precision_of(options.precision, options.device, partial(say, console))
    with busy(console, f"Loading {source}"):
        generator = load_model(source, device=options.device, precision=precision)
    if not generator.is_generator:
        raise UserError(f"{source} is a teacher; give the generator that was distilled from it")
    name = options.teacher or teacher_named_by(generator)
    with busy(console, f"Loading the teacher {name}"):
        teacher = load_model(name, device=options.device, precision=precision)
    if teacher.is_generator or teacher.denoiser.image_shape != generator.denoiser.image_shape:
        raise UserError(f"--teacher {name} is no teacher of pictures of this generator's shape")
    prompt = _prompt_of(generator, options.prompt)
    timings: list[Timing] = []
    with working(console, "Timing both models") as report:
        rounds = 3 if options.compile else 2
        for number, size in enumerate(sizes):
            report(number * rounds, len(sizes) * rounds)
            slow = time_model(teacher, "teacher", size, prompt, options.seconds)
            fast = time_model(generator, "generator", size, prompt, options.seconds)
            timings += [slow, _beside(fast, slow)]
        if options.compile:
            compile_denoiser(generator.denoiser, generator.device)
            for number, size in enumerate(sizes):
                report(2 * len(sizes) + number, len(sizes) * rounds)
                slow = timings[2 * number]
                timings.append(
                    _beside(time_model(generator, "generator, compiled", size, prompt, options.seconds), slow)
                )
        report(len(sizes) * rounds, len(sizes) * rounds)
    facts = _facts(source, name, generator, precision)
    _print(timings, facts)
    if options.json_out is not None:
        with replaced_file(options.json_out) as aside:
            aside.write_text(
                json.dumps({**facts, "timings": [asdict(one) for one in timings]}, indent=1), encoding="utf-8"
            )
    return timings


def time_model(model: Model, name: str, batch_size: int, prompt: list[str], seconds: float) -> Timing:
    """Pictures of one batch size in the model's own number of steps, after one round that warms up."""

    def make() -> None:
        model.sample(
            prompt * batch_size or None, num_images=batch_size, batch_size=batch_size, output="tensor", progress=False
        )

    decoding = 0.0
    if model.decoder.factor > 1:
        x0 = torch.randn(batch_size, *model.denoiser.image_shape, device=model.device)
        decoding = _median(lambda: model.decoder.images(x0).cpu(), seconds / 4)[0]
    whole, rounds = _median(make, seconds)
    return Timing(name, batch_size, model.evaluations(), whole, min(decoding, whole), rounds, batch_size / whole)


def _median(work: Callable[[], object], seconds: float) -> tuple[float, int]:
    """(median seconds, rounds) over as many rounds as take `seconds`, but some; the first, which warms up, does not count."""
    _clocked(work)
    found: list[float] = []
    while len(found) < LEAST_ROUNDS or (sum(found) < seconds and len(found) < MOST_ROUNDS):
        found.append(_clocked(work))
        if found[0] > 10 * seconds:
            break
    return statistics.median(found), len(found)


def _clocked(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()  # its result lies on the CPU, so the device is done
    return time.perf_counter() - started


def _beside(timing: Timing, teacher: Timing) -> Timing:
    return replace(timing, ratio=teacher.seconds / timing.seconds)


def _batch_sizes(words: str) -> list[int]:
    parts = [word.strip() for word in words.split(",") if word.strip()]
    if not parts or not all(word.isdecimal() and 0 < int(word) <= 4096 for word in parts):
        raise UserError(f"--batch-sizes {words}: give numbers of pictures made at once, 1,8,64")
    return list(dict.fromkeys(int(word) for word in parts))


def teacher_named_by(generator: Model) -> str:
    """The teacher that a generator's card says it was distilled from.

    Raises:
        UserError: the card does not say.
    """
    settings: Any = generator.card.made_with.get("settings")
    teacher = settings.get("teacher") if isinstance(settings, dict) else None
    path = teacher.get("path") if isinstance(teacher, dict) else None
    if not isinstance(path, str) or not path:
        raise UserError("this generator's card names no teacher; give it with --teacher")
    return path


def _prompt_of(generator: Model, prompt: str) -> list[str]:
    if generator.conditioner.takes == "prompts":
        return [prompt or "a photograph of a red apple"]
    if prompt:
        raise UserError(f"--prompt {prompt}: this model takes classes, and all take turns")
    return []


def _facts(source: str, teacher: str, model: Model, precision: str) -> dict[str, Any]:
    device = model.device
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    height, width = model.size
    return {
        "model": source, "teacher": teacher, "size": f"{height}x{width}", "precision": precision, "device": f"{device.type} ({named})",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "fewstep": __version__,
    }  # fmt: skip


COLUMNS = ("model", "at once", "evaluations", "seconds", "decoding", "images/s", "x teacher")


def _print(timings: Sequence[Timing], facts: dict[str, Any]) -> None:
    table = Table(*COLUMNS)
    for one in timings:
        cells = [
            f"{one.seconds:.3g}",
            f"{one.decoding:.3g}" if one.decoding else "-",
            f"{one.images_per_second:.3g}",
            f"{one.ratio:.3g}",
        ]
        table.add_row(one.model, str(one.batch_size), str(one.evaluations), *cells)
    console = Console()
    console.print(table)
    names = ("size", "precision", "device", "threads", "torch")
    console.print(", ".join(f"{name} {facts[name]}" for name in names), highlight=False, soft_wrap=True)
