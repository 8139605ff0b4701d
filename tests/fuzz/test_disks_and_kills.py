"""A sample of the full disks and of the kills; all of them in the long run."""

import os
import subprocess
import sys

import pytest

needs_mounts = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"]).returncode != 0,
    reason="small file systems are mounted by root",
)


def ends_well(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.slow
@needs_mounts
def test_some_full_disks() -> None:
    ends_well("tests.fuzz.disks", "--sizes", "1", "--only", "sample grid")


@pytest.mark.long
@needs_mounts
def test_full_and_read_only_disks_under_every_command() -> None:
    """Six full disks and a read-only one for each of 15 commands."""
    ends_well("tests.fuzz.disks", "--sizes", "6")


@pytest.mark.long
@pytest.mark.parametrize("name", ["class-run", "text-run"])
def test_fifty_kills(name: str) -> None:
    ends_well("tests.fuzz.kills", name, "--kills", "50")
