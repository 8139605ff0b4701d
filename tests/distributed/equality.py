"""One process of the equality tests: what a step changes, and where 20 steps lead, written by the first process.

    python -m tests.distributed.equality OUT.safetensors "edm/1/sharded/0" ...

A case is kind / number of micro-batches / where the teacher lies / processes that share a copy.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.distillation.sharding import Spread, build_spread
from fewstep.parallel import is_first, joined, local_batch, world_size
from fewstep.training.step import two_time_scale_step
from tests.training.test_micro_batches import BATCH, ExactDraws, build, flat, gradients

STEPS = 20


def spread_of(case: str) -> Spread | None:
    _, _, teacher, shard_over = case.split("/")
    return build_spread(torch.device("cpu"), teacher, int(shard_over))  # type: ignore[arg-type]


def changed(case: str) -> dict[str, Tensor]:
    """Gradients and metrics of one step."""
    kind, parts, *_ = case.split("/")
    generator, fake_score, metrics = gradients(kind, BATCH // world_size() // int(parts), spread_of(case))
    return {"generator": generator, "fake_score": fake_score, **{f"metric {k}": v for k, v in metrics.items()}}


def trained(case: str) -> dict[str, Tensor]:
    """Weights after 20 steps of AdamW."""
    kind, parts, *_ = case.split("/")
    run, real = build(kind, BATCH // world_size() // int(parts), spread_of(case), rate=1e-3)
    first, own = local_batch(BATCH)
    for step in range(STEPS):
        two_time_scale_step(run, step, real, ExactDraws.of_batch(3, step, own, first=first))
    return {"trained generator": flat(run.generator_update), "trained fake_score": flat(run.fake_score_update)}


def answer(out: Path, cases: list[str], long: bool) -> None:
    """Write what the processes that joined find."""
    found: dict[str, Tensor] = {}
    with warnings.catch_warnings():  # an error: a view that an operation in place could take a hook from
        warnings.filterwarnings("error", message="FSDP2-wrapped")
        for case in cases:
            results: dict[str, Any] = changed(case) | (trained(case) if long else {})
            found |= {f"{case}|{name}": value.detach().clone() for name, value in results.items()}
    if is_first():
        save_file(found, out)


def main(out: Path, cases: list[str], long: bool) -> None:
    torch.set_num_threads(1)
    with joined("cpu"):
        answer(out, cases, long)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [word for word in sys.argv[2:] if word != "--long"], "--long" in sys.argv)
