"""What one forward and backward of a LoRA role dispatches, and its CPU time: does not depend on the machine's load, but for the time.

    PYTHONPATH=src:. python benchmarks/lora_operations.py [--family sdxl] [--merged]

`--merged`: what forwards without gradient would take with W + (alpha / rank) B A made once, and making it, in turns. On a tiny network of a family, with bf16 weights and rank 4. Views are left out: they launch nothing.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.networks.adapters import LoraShape, SharedBase
from tests.networks.test_lora_layers import Operations
from tests.tiny_networks import some_levels, tiny_condition, tiny_text_denoiser

VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "expand", "permute", "unsqueeze", "squeeze", "slice", "detach", "alias", "split",
    "empty", "empty_like", "as_strided", "select", "chunk", "reshape",
}  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", default="sdxl", choices=["sd", "sdxl", "sd3"])
    parser.add_argument("--merged", action="store_true")
    chosen = parser.parse_args()
    family = chosen.family
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        shared = SharedBase(tiny_text_denoiser(family).to(dtype), LoraShape(4, 4.0))
        role = shared.add_role("generator")
        shared.base.compute_dtype = dtype
        level, condition, noisy = some_levels(shared.base, 300, 20), tiny_condition(family), torch.randn(2, 4, 8, 8)

        def work(network: Any = role, noisy: Any = noisy, level: Any = level, condition: Any = condition) -> None:
            network.denoise(noisy, level, condition).square().mean().backward()

        def look(network: Any = role, noisy: Any = noisy, level: Any = level, condition: Any = condition) -> None:
            with torch.no_grad():
                network.denoise(noisy, level, condition)

        if chosen.merged:
            compare_merged(f"{family}, {str(dtype)[6:]}", shared, look)
            continue
        for name, job in (("forward and backward", work), ("forward, no gradient", look)):
            job()
            with Operations() as found:
                job()
            times = []
            for _ in range(15):
                began = time.process_time()
                job()
                times.append(time.process_time() - began)
            kernels = sum(count for key, count in found.counts.items() if key not in VIEWS)
            casts = found.counts["_to_copy"] + found.counts["_foreach_copy_"]
            layers = f"{family}, {len(shared.layers)} layers, {str(dtype)[6:]}"
            print(f"{layers}, {name}: {kernels} kernels, {casts} casts, {1e3 * min(times):.1f} ms of CPU (least of 15)")


@torch.no_grad()
def compare_merged(title: str, shared: SharedBase, look: Callable[..., None], rounds: int = 60) -> None:
    """Print least and median CPU time of a LoRA role's forward, of one with merged weights (the base's own), and of merging."""

    def merge() -> list[Tensor]:
        return [
            layer.weight + layer.delta_weight("generator").to(layer.weight.dtype) for layer in shared.layers.values()
        ]

    jobs: dict[str, Callable[[], Any]] = {"LoRA": look, "merged": lambda: look(shared.base), "merging": merge}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 2):
        for name, job in jobs.items():
            began = time.process_time()
            job()
            if number > 1:
                times[name].append(1e3 * (time.process_time() - began))
    for name, found in times.items():
        found.sort()
        low, middle, high = found[0], found[rounds // 2], found[rounds * 9 // 10]
        print(
            f"{title}, {name}: least {low:.1f}, median {middle:.1f}, nine in ten below {high:.1f} ms of CPU ({rounds})"
        )


if __name__ == "__main__":
    main()
