"""`fewstep doctor` under torchrun names what processes do not have in common, and the one that does not answer.

That it says so of two real processes, in the first one's words only, is asked in tests/distributed/test_together.py.
"""

import pytest

from fewstep.demos.doctor_many import differences, table
from tests.distributed.processes import run_processes

ROW = {"machine": "a", "device": "cuda H100", "fewstep": "1", "Python": "3.12", "torch": "2.9", "disk free, GiB": "80"}


def test_a_row_for_each_process_and_what_differs() -> None:
    facts = [ROW, {**ROW, "torch": "2.8", "disk free, GiB": "1"}, {**ROW, "torch": "2.8", "machine": "longer"}]
    assert next(table(facts)).split() == ["process", *" ".join(ROW).split()]
    assert list(table(facts))[3].startswith("2        longer   cuda H100  1")
    assert list(differences(facts)) == [
        "process 1, 2: torch 2.8, process 0 has 2.9",
        "process 1: less than 2 GiB of disk are free in its folder, too little for larger runs",
    ]
    assert not list(differences([ROW, ROW]))


STALLS = """
import os, time
from fewstep import parallel
if os.environ["RANK"] == "1":
    parallel.dist.all_reduce = lambda *arguments, **named: (time.sleep(12), os._exit(3))
from fewstep.__main__ import main
import sys
sys.argv = ["fewstep", "doctor"]
main()
"""


@pytest.mark.long
def test_a_process_that_does_not_answer_is_named() -> None:
    """Within the time limit, by the one that waited for it."""
    each = {number: {"FEWSTEP_WAIT_SECONDS": "6"} for number in range(2)}
    (code, said), _ = run_processes(2, "-c", STALLS, each=each, timeout=60)
    assert code == 2
    assert "fewstep: waited in vain before the end of an exchange was told: [Rank 0]: Ranks 1 failed" in said
