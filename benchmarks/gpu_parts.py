"""The parts of the GPU benchmark that measure: ceilings, golden steps, whole steps in every memory mode, a profile."""

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import gpu_correctness
import torch
from gpu_runs import (
    FOUR_STEPS,
    Case,
    Measured,
    build_run,
    count_flops,
    describe_network,
    freed,
    measure,
    our_step,
    real_batch,
    settings_of,
    synchronise,
    updates,
)
from plain import PlainStep

from fewstep.diffusion.draws import Draws
from fewstep.estimate.memory import estimate_run
from fewstep.families.registry import build_on_meta
from fewstep.training.step import Distillation

GIB = 2**30
ROOM_FOR_ADAMW = 100 * GIB  # SDXL in full: 91 GiB of weights, gradients and states


def machine(bench: Any) -> None:
    """What it is, and the two ceilings: matrix products and copies."""
    on_gpu = bench.device.startswith("cuda")
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else 0
    bench.facts["memory_gib"] = memory / GIB
    size = 8192 if on_gpu else 256
    rates = {}
    for label, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        a, b = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))
        seconds = timed(lambda a=a, b=b: a @ b, bench.device, 10 if dtype != torch.float32 else 4)
        rates[label] = bench.facts[f"{label}_flops"] = 2 * size**3 / seconds
    source = torch.empty(2**30 if on_gpu else 2**16, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    copied = 2 * source.numel() / timed(lambda: target.copy_(source), bench.device, 10)
    bench.add(
        device=name, torch=torch.__version__, memory_GiB=memory / GIB,
        **{f"{label} TFLOP/s": rate / 1e12 for label, rate in rates.items()}, **{"copy TB/s": copied / 1e12},
    )  # fmt: skip


def timed(work: Callable[[], object], device: str, repeats: int) -> float:
    """Seconds a call, after three that warm up."""
    for _ in range(3):
        work()
    synchronise(device)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronise(device)
    return (time.perf_counter() - started) / repeats


def correctness(bench: Any) -> None:
    """Keyed draws and golden steps."""
    for row in gpu_correctness.draw_rows(bench.device):
        bench.note("draws, device against CPU: " + ", ".join(f"{name} {value:.6g}" for name, value in row.items()))
    if bench.device.startswith("cuda"):
        from fewstep.diffusion.philox import fused_draws

        fused = fused_draws(torch.empty(0, device=bench.device).device)
        bench.note(f"draws: {'one fused kernel each' if fused else 'NOT fused, a hundred kernels each'}")
    for name in ("edm", "sd15", "sdxl"):
        for row in gpu_correctness.golden_rows(name, bench.device):
            bench.add(**row)


def compare(bench: Any, case: Case, *, plain: bool = True, flops: float = 0.0, seconds: float = 6.0) -> float:
    """Rows of one case: ours, and the plain reading on the same networks. Returns operations a sample, 0 if not counted."""
    if bench.tiny:
        case = replace(case, tiny=True, batch=min(2, case.batch))
        seconds = 0.0
    counted = 0.0
    with if_it_fits(bench, case):
        counted = _compare(bench, case, plain, flops, seconds)
    return counted


def _compare(bench: Any, case: Case, plain: bool, flops: float, seconds: float) -> float:
    """`compare`, whose networks are gone when it returns."""
    rate = bench.facts.get(f"{case.precision}_flops", 0.0)
    run = build_run(case, bench.device)
    real = real_batch(run, case.batch, bench.device)
    ours = measure(our_step(run), real, case.batch, bench.device, seconds=seconds)
    ours.flops = flops * case.batch or count_flops(run, case, bench.device)
    _add(bench, case, "fewstep", ours, rate, None)
    for update in updates(run):
        update.optimizer.state.clear()
    if plain:
        step = PlainStep(run, case.guidance, torch.optim.SGD if case.sgd else torch.optim.AdamW)
        theirs = measure(step, real, case.batch, bench.device, seconds=seconds)
        theirs.flops = ours.flops
        _add(bench, case, "plain", theirs, rate, theirs.milliseconds / ours.milliseconds)
    return ours.flops / case.batch


@contextmanager
def if_it_fits(bench: Any, case: Case) -> Iterator[None]:
    """Give back the device's memory before and after a case; one that is out of memory is noted."""
    with freed():
        try:
            yield
        except torch.OutOfMemoryError as error:
            bench.note(f"{case.title.replace(' | ', ', ')}: out of memory ({str(error).splitlines()[0][:90]})")


def _add(bench: Any, case: Case, name: str, found: Measured, rate: float, ratio: float | None) -> None:
    network, mode, batch = case.title.split(" | ")
    bench.add(
        network=network, mode=mode, batch=int(batch), precision=case.precision, step=name, ms=found.milliseconds,
        spread=f"{min(found.cycles):.0f}..{max(found.cycles):.0f}", **{
            "images/s": 1e3 * case.batch / found.milliseconds, "peak GiB": found.peak_gib,
            "TFLOP a step": found.flops / 1e12, "of matrix rate": found.utilisation(rate),
            "ours is faster by": "" if ratio is None else ratio,
        },
    )  # fmt: skip


def edm(bench: Any) -> None:
    """ImageNet-64's network at the published batch per GPU, then larger."""
    per_sample = compare(bench, Case("edm", 40))
    compare(bench, Case("edm", 40, precision="fp32"), flops=per_sample, seconds=3)
    if bench.facts.get("memory_gib", 0) > 70:
        compare(bench, Case("edm", 80), flops=per_sample, seconds=4)


def sd15(bench: Any) -> None:
    """Stable Diffusion 1.5's network, guided as published, in all memory modes."""
    for mode in ("full", "lora_generator", "shared_base"):
        compare(bench, Case("sd15", 4, mode, guidance=1.75), seconds=4)
    compare(bench, Case("sd15", 4, "full", guidance=1.75, checkpoint=True), plain=False, seconds=3)


def sdxl(bench: Any) -> None:
    """SDXL's network, guided, four steps, in all memory modes; the shared base must fit into 24 GiB."""
    case = Case("sdxl", 1, "shared_base", guidance=8.0, steps=FOUR_STEPS)
    counted = compare(bench, case, seconds=4)
    recomputed = replace(case, checkpoint=True)
    compare(bench, recomputed, plain=False, flops=counted, seconds=3)
    rows = [row for row in bench.rows.get(bench.part, []) if "recomputed" in row["mode"]]
    if rows:
        peak = rows[-1]["peak GiB"]
        bench.note(
            f"SDXL on a shared base, recomputed, batch 1: {peak:.1f} GiB, {'within' if peak < 24 else 'ABOVE'} 24 GiB"
        )
    sgd = bench.facts.get("memory_gib", 0) * GIB < ROOM_FOR_ADAMW and not bench.tiny
    full = replace(case, mode="full", sgd=sgd)
    counted = compare(bench, full, seconds=4)
    compare(bench, replace(full, batch=4, checkpoint=True), flops=counted, seconds=4)
    compare(bench, replace(case, batch=4, checkpoint=True), plain=False, seconds=4)
    compare(bench, replace(case, mode="lora_generator", checkpoint=True), plain=False, seconds=3)


def one_card(bench: Any) -> None:
    """Three roles on one frozen base with GAN at batch 1, by how the base is stored: time, and memory beside its estimate.

    Latents of 1024x1024 pictures; prompts of the length that the family's example has.
    """
    sdxl = Case("sdxl", 1, "shared_base", guidance=8.0, steps=FOUR_STEPS, checkpoint=True)
    cases = [replace(sdxl, base="int8"), replace(sdxl, base="nf4"), replace(sdxl, offload=True)]
    cases += [replace(sdxl, network=name, base="nf4", guidance=4.0)
              for name in ("z-image", "flux2-klein-4b", "qwen-image")]  # fmt: skip
    for case in cases:
        if bench.tiny and case.network not in ("sdxl", "z-image"):
            continue
        case = replace(case, tiny=bench.tiny)
        with if_it_fits(bench, case):
            _measure_storage(bench, case)


def _measure_storage(bench: Any, case: Case) -> None:
    """A row of `one_card`."""
    started = time.perf_counter()
    run = build_run(case, bench.device)
    found = measure(our_step(run), real_batch(run, case.batch, bench.device), case.batch, bench.device, seconds=0.0)
    network, mode, batch = case.title.split(" | ")
    bench.add(
        network=network, mode=mode, batch=int(batch), ms=found.milliseconds,
        **{"peak GiB": found.peak_gib, "estimated GiB": estimated_gib(case)},
        **{"seconds in all": time.perf_counter() - started},
    )  # fmt: skip


def estimated_gib(case: Case) -> float:
    """What a dry run says of a step of the case on a GPU, from shapes alone."""
    return estimate_run(settings_of(case), build_on_meta(describe_network(case)), gpu=True, pictures=False).step / GIB


def profile_steps(bench: Any) -> None:
    """Kernels, launches and waits of one generator's turn and one other step."""
    two_steps = Case("edm", 40, steps=(650, 400), inputs="simulated_per_sample")
    for case in (Case("edm", 40), two_steps, Case("sdxl", 1, "shared_base", guidance=8.0, steps=FOUR_STEPS)):
        with freed():
            small = replace(case, tiny=True, batch=2) if bench.tiny else case
            _profile(bench, small, build_run(small, bench.device))
            gc.collect()


def _profile(bench: Any, case: Case, run: Distillation) -> None:
    from torch.profiler import ProfilerActivity, profile

    step_function, real = our_step(run), real_batch(run, case.batch, bench.device)
    on_gpu = bench.device.startswith("cuda")
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    for step, turn in ((0, "generator's turn"), (1, "other step")):
        draws = [Draws.of_batch(0, step, case.batch, bench.device) for _ in range(3)]
        for each in draws[:2]:
            step_function(step, real, each)
        synchronise(bench.device)
        started = time.perf_counter()
        step_function(step, real, draws[0])
        synchronise(bench.device)
        wall = time.perf_counter() - started
        waits = _count_waits(lambda step=step, draw=draws[1]: step_function(step, real, draw)) if on_gpu else 0
        with profile(activities=activities) as profiler:
            step_function(step, real, draws[2])
            synchronise(bench.device)
        times = {
            e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in profiler.key_averages()
        }
        counts = {e.key: e.count for e in profiler.key_averages()}
        spent = {key: value for key, value in times.items() if value > 0}  # without what only the host did
        total = sum(spent.values()) or 1.0
        bench.add(
            network=case.network, inputs=case.inputs, turn=turn, ms=1e3 * wall, **{
                "kernel ms": total / 1e3, "busy": total / 1e6 / wall, "launches": sum(counts[key] for key in spent),
                "waits of the host": waits,
            },
        )  # fmt: skip
        top = sorted(spent, key=spent.__getitem__, reverse=True)[:12]
        names = "; ".join(f"{100 * spent[key] / total:.0f}% {counts[key]} x `{key[:60]}`" for key in top)
        bench.note(f"{case.network}, {turn}, top kernels: {names}")


def _count_waits(work: Callable[[], object]) -> int:
    """How often the host waits for the device, by torch's own debug mode."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)
