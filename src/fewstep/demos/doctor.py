"""`fewstep doctor`: what this machine is good for, in a few measured lines."""

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console

from fewstep import __version__
from fewstep.demos.fashion_mnist import FACTS
from fewstep.demos.pace import MEASURING_SHARE
from fewstep.devices import check_compiler, choose_device, choose_precision
from fewstep.errors import UserError
from fewstep.progress import Stderr, busy
from fewstep.training.build import open_teacher
from fewstep.training.distill import DistillationJob
from fewstep.training.run import prepare_run

MINUTES = 5.0  # of training in a quick start
STEPS_ENOUGH = 1_000  # in the quick start of classes, after which its pictures look like its teacher's
_GIB = 2**30
_TEXT = ("diffusers", "transformers", "peft")


def examine() -> Iterator[str]:
    """Lines about versions, device, precision, disk, the time of a quick start, and what would fail."""
    console = Stderr()
    yield f"fewstep {__version__}, Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"
    found = {name: _version(name) for name in (*_TEXT, "gradio", "tensorboard")}
    yield "with " + ", ".join(f"{name} {number}" for name, number in found.items() if number)
    device = choose_device("auto")
    yield _device_line(device)
    yield choose_precision_line(device)
    yield f"{shutil.disk_usage(Path.cwd()).free / _GIB:.0f} GiB of disk are free here, {_memory_gib():.0f} GiB of memory in all"
    with busy(console, "Measuring a training step"):
        seconds = step_seconds()
    yield quickstart_line(seconds)
    faults = list(_faults(found, device))
    yield "everything that fewstep can do would run here" if not faults else "what would fail here:"
    yield from (f"  - {fault}" for fault in faults)


def quickstart_line(seconds: float) -> str:
    """What a step of this many seconds makes of the quick starts."""
    steps = int(60 * MINUTES / seconds)
    minutes = MINUTES * (1 + MEASURING_SHARE) + 1
    line = (
        f"a quick start takes about {minutes:.0f} minutes here, whatever the machine: {MINUTES:.0f} of training, the rest for "
        f"measuring; a step takes about {seconds:.2g} s, so it makes about {steps:,} steps"
    )
    if steps >= STEPS_ENOUGH:
        return line
    wanted = -(-STEPS_ENOUGH * seconds // 60)
    return f"{line}; the pictures will be rough: give it `fewstep quickstart --minutes {wanted:.0f}`"


def step_seconds(share: int = 8) -> float:
    """Seconds of a step of the quick start of classes: measured on a part of its batch, after one that warms up."""
    with tempfile.TemporaryDirectory(prefix="fewstep-doctor-") as folder:
        settings = FACTS.settings(MINUTES, Path(folder))
        settings = prepare_run(settings, Path(folder), Console(quiet=True))
        size = max(1, settings.training.batch_size // share)
        training = settings.training.model_copy(update={"batch_size": size})
        settings = settings.model_copy(update={"training": training})
        job = DistillationJob(settings, open_teacher(settings))
        every = training.generator_every
        job.step(0, 0.0)
        begun = time.perf_counter()
        for step in range(1, 1 + every):  # one of them is the generator's turn
            job.step(step, 0.0)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) / every * share


def choose_precision_line(device: torch.device) -> str:
    """What is fast on the device, measured."""
    told: list[str] = []
    choose_precision("auto", device, told.append)
    return told[0] if told else ""


def _device_line(device: torch.device) -> str:
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return f"device {facts.name}, {facts.total_memory / _GIB:.0f} GiB, {torch.cuda.device_count()} of them"
    instructions = torch.backends.cpu.get_cpu_capability()
    return (
        f"device cpu: {platform.processor() or platform.machine()}, instructions {instructions}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads; text-to-image models of real size need a GPU"
    )


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB if hasattr(os, "sysconf") else float("nan")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _faults(found: dict[str, str], device: torch.device) -> Iterator[str]:
    missing = [name for name in _TEXT if not found[name]]
    if missing:
        yield f"text-to-image models: {', '.join(missing)} is missing; in a clone: {_pip('.[text]')}"
    if not found["gradio"]:
        yield f"fewstep app: gradio is missing; in a clone: {_pip('.[app]')}"
    try:
        check_compiler(device)
    except UserError as error:
        yield f"--compile and compute.compile: {error}"
    if shutil.disk_usage(Path.cwd()).free < 2 * _GIB:
        yield "checkpoints of larger runs: less than 2 GiB of disk are free here"


def _pip(what: str) -> str:
    return f"{sys.executable} -m pip install '{what}'"
