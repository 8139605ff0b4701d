"""What many processes prepare is what one makes, byte for byte, also after one of them was killed."""

import json
import sys
from pathlib import Path

import pytest

from fewstep.data.shard_folder import MANIFEST
from tests.distributed.kills import run
from tests.distributed.preparing import FOLDERS, files_of, prepare, write_sources


@pytest.mark.long
def test_a_killed_process_costs_its_shard(tmp_path: Path) -> None:
    """torchrun starts all again, and they go on by themselves."""
    write_sources(tmp_path)
    prepare(tmp_path, tmp_path / "alone")
    said = run([
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
        "-m", "tests.distributed.preparing", str(tmp_path), str(tmp_path / "many"),
    ])  # fmt: skip
    assert (tmp_path / "died").exists()
    assert "exitcode: -9" in said
    expected = files_of(tmp_path / "alone")
    assert files_of(tmp_path / "many") == expected
    for name in FOLDERS:
        assert len(json.loads(expected[f"{name}/{MANIFEST}"])["shards"]) == 5
