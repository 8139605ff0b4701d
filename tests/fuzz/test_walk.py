"""A sample of the walk over every file and key; the whole of it in the long run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAN_MOUNT = hasattr(os, "geteuid") and os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"]).returncode == 0


def walk(tmp_path: Path, *arguments: str) -> dict[str, object]:
    """What the walk found, made in a process of its own that may fork."""
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "tests.fuzz.walk", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert out.is_file(), done.stderr[-3000:]
    found: dict[str, object] = json.loads(out.read_text())
    return found


@pytest.mark.slow
def test_a_sample_of_all_damaged_files_and_a_full_disk(tmp_path: Path) -> None:
    disks = ["--disks", "sample grid"] if CAN_MOUNT else []
    found = walk(tmp_path, "--sample", "24", "--seed", os.environ.get("FUZZ_SEED", "0"), *disks)
    assert found["failures"] == []
    assert found.get("disks", 0) == (2 if CAN_MOUNT else 0)
    assert int(str(found["mutants"])) >= 40
    assert int(str(found["exit 2"])) > 20  # the mutants bite
    assert int(str(found["exit 0"])) > 3  # and are not all crude


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_every_damaged_file(tmp_path: Path, part: int) -> None:
    assert walk(tmp_path, "--part", f"{part}/4")["failures"] == []
