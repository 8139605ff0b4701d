"""What happens to many processes that measure together when one of them dies."""

from pathlib import Path

import pytest

from tests.distributed.evaluating import write_parts
from tests.distributed.processes import run_processes


@pytest.mark.long
def test_a_process_that_dies_is_told_in_a_sentence(tmp_path: Path, teacher_folder: Path) -> None:
    write_parts(tmp_path)
    (code, said), (other, _) = run_processes(
        2, "-m", "tests.distributed.evaluating", str(tmp_path), str(teacher_folder)
    )
    assert (code, other) == (2, 1)
    assert said.splitlines()[-1].startswith("fewstep: the processes lost each other (")
    assert "Traceback" not in said
