"""Any number of processes and micro-batches give the same gradients and weights as one, in float64."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.equality import changed, trained
from tests.distributed.processes import run_processes
from tests.distributed.traps import TRAPS

CI = [
    "edm/2/replicated/0", "edm hellinger/2/sharded/0", "edm shared/2/sharded/0", "sd3 shared_base/1/sharded/0",
    "sd3 full taps/2/sharded/0", "sd3 shared_base taps/1/sharded/0",
]  # fmt: skip
KINDS = [
    "edm",
    "edm hellinger",
    "edm shared",
    "sd shared_base shared",
    "edm hellinger taps",
    "sdxl full taps",
    "sd lora_generator shared taps",
    *(f"{family} {mode}" for family in ("sd", "sdxl", "sd3") for mode in ("full", "lora_generator", "shared_base")),
]


def compare(processes: int, cases: list[str], tmp_path: Path) -> None:
    out = tmp_path / "found.safetensors"
    words = ("-m", "tests.distributed.equality", str(out), *cases, "--long")
    ended = run_processes(processes, *words, timeout=3000)
    assert [code for code, _ in ended] == [0] * processes, "\n".join(said for _, said in ended)
    equal_to_one(out, cases, long=True)


def equal_to_one(out: Path, cases: list[str], long: bool = False) -> None:
    """What processes wrote of some cases is what this one finds."""
    found = load_file(out)
    alone: dict[str, dict[str, torch.Tensor]] = {}
    for case in cases:
        kind = case.split("/")[0]
        if kind not in alone:
            whole = f"{kind}/1/sharded/0"
            alone[kind] = changed(whole) | (trained(whole) if long else {})
        for name, value in alone[kind].items():
            mine, bound = found[f"{case}|{name}"], 1e-8 if name.startswith("trained") else 1e-10
            if name.startswith("metric"):
                assert float(mine) == pytest.approx(float(value), rel=1e-6), (case, name)
            else:
                assert float(value.norm()) > 1e-4
                assert float((mine - value).norm() / value.norm()) < bound, (case, name)


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_family_mode_and_split(processes: int, tmp_path: Path) -> None:
    """Gradients to 1e-10 and weights after 20 steps to 1e-8, the teacher sharded, replicated and offloaded, copies in nodes."""
    splits = {
        1: ["2/sharded/0", "4/sharded/0"],
        2: ["1/sharded/0", "2/replicated/0", "4/offloaded/0"],
        4: ["1/sharded/0", "2/sharded/2"],
    }
    compare(processes, [f"{kind}/{split}" for kind in KINDS for split in splits[processes]], tmp_path)


@pytest.mark.long
def test_each_trap_is_seen(tmp_path: Path) -> None:
    """With a fault put in, what two processes find is not what one does."""
    ended = run_processes(2, "-m", "tests.distributed.traps", str(tmp_path), timeout=3000)
    assert [code for code, _ in ended] == [0, 0], "\n".join(said for _, said in ended)
    for name, (case, _) in TRAPS.items():
        with pytest.raises(AssertionError):
            equal_to_one(tmp_path / f"{name}.safetensors", [case])
