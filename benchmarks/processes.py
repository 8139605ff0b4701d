"""Print the table of docs/scaling.md: memory and time of a step for 1, 2 and 4 processes, measured, beside what the estimate says.

    python -m benchmarks.processes                     in a clone; three minutes of CPU for each mode
    python -m benchmarks.processes --modes full --processes 1 2

The network is the small SDXL-like one of tests/estimate/memory_cases.py, on CPUs over gloo, one thread a process. Memory is the
peak of live tensors of the process that has most. Of time, what a process computes says more than what elapses, where cores are
shared. The estimate is that of estimate/many.py with this machine's rates: the operations of the process's samples at the rate of
one process alone, and the bytes that travel at the rate of a measured sum.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.estimate.describe import average_flops
from fewstep.estimate.many import Layout, own_settings
from fewstep.estimate.memory import estimate_run
from fewstep.families.registry import build_on_meta
from fewstep.parallel import exchange_seconds, joined, rank, wait_for_all, world_size
from tests.distributed.processes import run_processes
from tests.estimate.memory_cases import built_step, case_settings, description, drawn_network, measured_peak

SIZE, BATCH, MODES = "large", 4, ("full", "lora_generator", "shared_base")
WARMUP, STEPS, VALUES = 1, 3, 4_000_000


@dataclass(frozen=True)
class Figures:
    """What was measured of some processes.

    Attributes:
        peak: bytes of live tensors, of the process that has most.
        seconds: of the steps, in order, of the first process.
        cpu_seconds: of the same, that the process computed.
        sum_seconds: of a sum of `VALUES` numbers over all; 0 for one process.
    """

    peak: int
    seconds: list[float]
    cpu_seconds: list[float]
    sum_seconds: float


def measure_own(out: Path, mode: str, batch: int) -> None:
    """One process: memory first, then time without the profiler, from a fresh start."""
    torch.set_num_threads(1)
    with joined("cpu"):
        settings = case_settings(mode, batch)
        peak, seconds, cpu_seconds = measured_peak(settings, SIZE), [], []
        step = built_step(settings, drawn_network(SIZE))
        for number in range(WARMUP + STEPS):
            wait_for_all("a step")
            begun, computed = time.perf_counter(), time.process_time()
            step(number)
            seconds.append(time.perf_counter() - begun)
            cpu_seconds.append(time.process_time() - computed)
        several = world_size() > 1
        sums = min(exchange_seconds(VALUES, torch.device("cpu")) for _ in range(4)) if several else 0.0
        told = {"peak": peak, "seconds": seconds[WARMUP:], "cpu": cpu_seconds[WARMUP:], "sum_seconds": sums}
        (out / f"{rank()}.json").write_text(json.dumps(told), encoding="utf-8")


def measure(mode: str, processes: int) -> Figures:
    """Start processes that share the batch."""
    with tempfile.TemporaryDirectory() as folder:
        words = ("-m", "benchmarks.processes", "--own", folder, mode, str(BATCH // processes))
        ended = run_processes(processes, *words, timeout=900)
        if any(code for code, _ in ended):
            raise SystemExit("\n".join(said for _, said in ended))
        found = [json.loads((Path(folder) / f"{number}.json").read_text()) for number in range(processes)]
    return Figures(max(one["peak"] for one in found), found[0]["seconds"], found[0]["cpu"], found[0]["sum_seconds"])


def estimated(mode: str, processes: int, figures: Figures, rate: float) -> tuple[float, float, float]:
    """Bytes of the first process, and seconds of its arithmetic and of what it exchanges in a step."""
    network = build_on_meta(description(SIZE))
    settings = own_settings(case_settings(mode, BATCH), processes)
    estimate = estimate_run(settings, network, gpu=False, pictures=False)
    arithmetic = average_flops(settings, estimate) / rate
    if processes == 1:
        return estimate.step, arithmetic, 0.0
    layout, sent = Layout(settings, network, processes, estimate), 2 * 4 * VALUES * (1 - 1 / processes)
    return sum(layout.memory().values()), arithmetic, sum(layout.exchanged()) * figures.sum_seconds / sent


def rate_of(mode: str, alone: Figures) -> float:
    """Operations a second that one process computes."""
    settings = case_settings(mode, BATCH)
    estimate = estimate_run(settings, build_on_meta(description(SIZE)), gpu=False, pictures=False)
    return average_flops(settings, estimate) / statistics.median(alone.cpu_seconds)


def spread(seconds: list[float]) -> str:
    """Median, and the ends."""
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}..{max(seconds):.2f})"


def machine() -> str:
    """The processor, its instructions, and what else it does."""
    said = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    name = next(
        (line.partition(":")[2].strip() for line in said.splitlines() if line.startswith("Model name")), "unknown"
    )
    more = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in said]
    return (
        f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()} {' '.join(more)}, torch {torch.__version__}, "
        f"load before {os.getloadavg()[0]:.1f}; batch {BATCH} of all processes, fp32, {STEPS} steps, one thread a process"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4], choices=[1, 2, 4])
    parser.add_argument("--own", nargs=3, metavar=("OUT", "MODE", "BATCH"), help="one of the processes")
    arguments = parser.parse_args()
    if arguments.own:
        out, mode, batch = arguments.own
        measure_own(Path(out), mode, int(batch))
        return
    print(machine(), "\n")
    columns = ("`memory.mode`", "processes", "MiB each", "estimated", "CPU s a step, each", "estimated arithmetic + exchange",
               "s elapsed")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    for mode in arguments.modes:
        alone = measure(mode, 1)
        rate = rate_of(mode, alone)
        for processes in arguments.processes:
            found = alone if processes == 1 else measure(mode, processes)
            peak, arithmetic, exchange = estimated(mode, processes, found, rate)
            row = (
                f"`{mode}`", str(processes), f"{found.peak / 2**20:.1f}", f"{peak / 2**20:.1f}", spread(found.cpu_seconds),
                "its rate is taken" if processes == 1 else f"{arithmetic:.2f} + {exchange:.2f}", spread(found.seconds),
            )  # fmt: skip
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
