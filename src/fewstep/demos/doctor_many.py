"""`fewstep doctor` under torchrun: whether the processes reach each other, how fast, and where they differ; the first one speaks.

torchrun --nproc-per-node 8 -m fewstep doctor
"""

import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from fewstep import __version__
from fewstep.devices import choose_device, choose_precision
from fewstep.errors import UserError
from fewstep.parallel import PATIENCE, exchange_seconds, gathered, joined, wait_for_all, world_size
from fewstep.shared_work import refuse_unshared

WAIT_SECONDS = 60  # unless the environment says more
MEGABYTES, TIMES = 64, 3  # of one exchange, and how many are timed
LEAST_DISK_GIB = 2.0
SAME = ("fewstep", "Python", "torch", "device")  # what processes of one run should have in common


def examine_together(tell: Callable[[str], None]) -> None:
    """Tell, line by line, what the processes that torchrun started are good for together.

    Raises:
        UserError: one does not come, or an exchange does not end in time; names it.
    """
    os.environ.setdefault(PATIENCE, str(WAIT_SECONDS))
    with joined("auto"):
        device = choose_device("auto")
        own = _facts(device)
        wait_for_all("their machines are compared")
        facts = gathered(own)
        for line in table(facts):
            tell(line)
        for place in [torch.device("cpu"), *([device] if device.type == "cuda" else [])]:
            tell(_exchange_line(place))
        faults = [*differences(facts), *_unshared()]
        tell("a run of these processes would start here" if not faults else "what would fail:")
        for fault in faults:
            tell(f"  - {fault}")


def table(facts: Sequence[dict[str, str]]) -> Iterator[str]:
    """A row for each process below the names of the columns."""
    rows = [["process", *facts[0]], *([str(number), *row.values()] for number, row in enumerate(facts))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()


def differences(facts: Sequence[dict[str, str]]) -> Iterator[str]:
    """Where processes have other versions or devices than the first one, or hardly any disk."""
    for name in SAME:
        others = [number for number, row in enumerate(facts) if row[name] != facts[0][name]]
        if others:
            found = sorted({facts[number][name] for number in others})
            yield f"process {', '.join(map(str, others))}: {name} {' and '.join(found)}, process 0 has {facts[0][name]}"
    for number, row in enumerate(facts):
        if float(row["disk free, GiB"]) < LEAST_DISK_GIB:
            yield f"process {number}: less than {LEAST_DISK_GIB:g} GiB of disk are free in its folder, too little for larger runs"


def _facts(device: torch.device) -> dict[str, str]:
    """What this process has, by column."""
    name = (
        torch.cuda.get_device_properties(device).name
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    return {
        "machine": socket.gethostname(), "device": f"{device.type} {name}", "threads": str(torch.get_num_threads()),
        "fast": choose_precision("auto", device), "fewstep": __version__, "Python": platform.python_version(),
        "torch": torch.__version__, "disk free, GiB": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.0f}",
    }  # fmt: skip


def _exchange_line(place: torch.device) -> str:
    seconds = min(exchange_seconds(MEGABYTES * 10**6 // 4, place) for _ in range(1 + TIMES))
    over = "NCCL" if place.type == "cuda" else "gloo"
    return (
        f"all {world_size()} reach each other over {over}: a sum of {MEGABYTES} MB takes {seconds:.3f} s ({MEGABYTES / 1e3 / seconds:.2g} GB/s), "
        f"the best of {1 + TIMES}"
    )


def _unshared() -> list[str]:
    """That run folders cannot be below the folder where the command was started."""
    try:
        refuse_unshared(Path.cwd(), "run.folder")
    except UserError as error:
        return [str(error)]
    return []
