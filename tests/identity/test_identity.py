"""The rebuilding changed no step: twenty steps of four runs are those that were recorded before its first change.

On the kind of machine that recorded them they are equal to the last bit; on another one to rounding, which AVX2 in the
place of AVX-512 shows to be below 3e-4 of any metric.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_main import fewstep
from tests.identity.record import RUNS, machine, make_inputs, record_run

BEFORE = json.loads((Path(__file__).parent / "before.json").read_text(encoding="utf-8"))


def command(*arguments: object) -> None:
    """`fewstep` in this process, which spares the imports of six others."""
    answer = fewstep(*arguments)
    assert answer.code == 0, answer.err


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    make_inputs(folder, command)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_are_what_they_were(work: Path, name: str) -> None:
    before, now = BEFORE["runs"][name], record_run(name, work, command)
    if machine() == BEFORE["machine"]:
        assert now == before
        return
    assert len(now["digests"]) == len(before["digests"])
    assert math.isclose(now["norm"], before["norm"], rel_tol=1e-5)
    for step, (found, expected) in enumerate(zip(now["metrics"], before["metrics"], strict=True)):
        assert _close(found, expected), (step, found, expected)


def _close(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(
        math.isclose(float.fromhex(found[key]), float.fromhex(expected[key]), rel_tol=5e-3, abs_tol=1e-7)
        for key in found
    )
