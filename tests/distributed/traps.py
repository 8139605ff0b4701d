"""Faults that many processes invite, put in one by one: what a step changes with each, for test_equality.py to tell from one process's.

    python -m tests.distributed.traps FOLDER

Each is a fault of the code, but for "the same noise" which is one of how it is called.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.draws import Draws
from fewstep.distillation.sharding import local
from fewstep.parallel import joined, rank
from fewstep.training import step, update
from tests.distributed.equality import answer
from tests.training.test_micro_batches import ExactDraws

shared, parts_of, exchange = Draws.shared_integer, step.micro_batches, update.synchronise


def own_step(draws: Draws, purpose: Any, high: int) -> int:
    return (shared(draws, purpose, high) + rank()) % high


def first_samples(seed: int, number: int, own: int, first: int) -> ExactDraws:
    return ExactDraws(seed, number, torch.arange(own))


def unweighed(*words: Any) -> list[Any]:
    return [replace(part, share=1.0) for part in parts_of(*words)]


def own_norm(gradients: list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm([local(gradient) for gradient in gradients])


def without_exchange(modules: Any, now: bool) -> None:
    exchange(modules, False)


TRAPS: dict[str, tuple[str, tuple[Any, str, Callable[..., Any]]]] = {
    # of networks in parts, processes that run other numbers of steps would lose each other
    "each process draws its own step index": ("sd3 shared_base/1/replicated/0", (Draws, "shared_integer", own_step)),
    "all processes have the same noise": ("edm/2/replicated/0", (ExactDraws, "of_batch", first_samples)),
    "micro-batches count as whole batches": ("edm/2/replicated/0", (step, "micro_batches", unweighed)),
    "a norm is that of a process's own parts": ("edm/2/replicated/0", (update, "gradient_norm", own_norm)),
    "the last micro-batch exchanges nothing": ("edm/2/replicated/0", (update, "synchronise", without_exchange)),
    "adapters keep a process's own gradients": (
        "sd3 shared_base/1/sharded/0",
        (update, "average_gradients", lambda _: None),
    ),
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with joined("cpu"):
        for name, (case, fault) in TRAPS.items():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(*fault)
                answer(folder / f"{name}.safetensors", [case], long=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
