"""What one forward and backward of a LoRA role dispatches, and its CPU time: does not depend on the machine's load, but for the time.

    PYTHONPATH=src:. python benchmarks/lora_operations.py [--family sdxl]

On a tiny network of a family, with bf16 weights and rank 4. Views are left out: they launch nothing.
"""

import argparse
import time
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.networks.adapters import LoraShape, SharedBase
from tests.tiny_networks import some_levels, tiny_condition, tiny_text_denoiser

VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "expand", "permute", "unsqueeze", "squeeze", "slice", "detach", "alias", "split",
    "empty", "empty_like", "as_strided", "select", "chunk", "reshape",
}  # fmt: skip


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", default="sdxl", choices=["sd", "sdxl", "sd3"])
    family = parser.parse_args().family
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


if __name__ == "__main__":
    main()
