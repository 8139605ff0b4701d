"""One command in a forked child with everything imported already: what it said, how long it took, how much it held."""

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn

CPU_SECONDS = 20
WALL_SECONDS = 90  # other work on the machine must not count as a hang
SPACE_BYTES = 4 * 2**30  # of addresses beyond what the imports take
PEAK_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Outcome:
    """How a child ended: exit code (negative: by this signal), all it wrote, processor seconds, peak resident bytes."""

    code: int
    said: str
    seconds: float
    peak_bytes: int


def preload() -> None:
    """Import what the commands import, so that a child begins with it."""
    import diffusers
    import torch
    import transformers

    for module in (
        "datasets", "pyarrow.parquet", "fewstep.cli.main", "fewstep.estimate.describe", "fewstep.evaluation.measure",
        "fewstep.evaluation.report.run_report", "fewstep.export.export", "fewstep.preparation.convert",
        "fewstep.preparation.embeddings", "fewstep.preparation.latents", "fewstep.preparation.pairs", "fewstep.training.run",
    ):  # fmt: skip
        import_module(module)
    torch.set_num_threads(1)
    names = ("UNet2DConditionModel", "SD3Transformer2DModel", "AutoencoderKL", "DDIMScheduler", "LCMScheduler")
    names += ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline")
    for name in names:
        getattr(diffusers, name)
    for name in ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer"):
        getattr(transformers, name)


def run_command(arguments: Sequence[object], log: Path, cpu_seconds: int = CPU_SECONDS) -> Outcome:
    """The command line with these arguments, in a child that may take so much of the processor."""
    return run_child(lambda: _main(arguments), log, cpu_seconds)


def become_command(arguments: Sequence[object], log: Path, cpu_seconds: int = CPU_SECONDS) -> NoReturn:
    """Be the command line with these arguments, in a child that was just forked."""
    _become(lambda: _main(arguments), log, cpu_seconds)


def _main(arguments: Sequence[object]) -> None:
    from fewstep.cli.main import main

    sys.argv = ["fewstep", *map(str, arguments), "--debug"]
    main()


def run_child(work: Callable[[], object], log: Path, cpu_seconds: int = CPU_SECONDS) -> Outcome:
    """Any work in a child that writes to `log`, within the limits."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _become(work, log, cpu_seconds)
    deadline = time.monotonic() + WALL_SECONDS * cpu_seconds / CPU_SECONDS
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    said = log.read_text(encoding="utf-8", errors="replace")
    return Outcome(code, said, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def _become(work: Callable[[], object], log: Path, cpu_seconds: int) -> NoReturn:
    code = 70
    try:
        opened = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        empty = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, empty), (1, opened), (2, opened)):
            os.dup2(source, target)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + SPACE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
