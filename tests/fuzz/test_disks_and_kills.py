"""Full disks and kills, all of them; tests/fuzz/test_walk.py takes a sample of the disks."""

import subprocess
import sys

import pytest

from tests.fuzz.test_walk import CAN_MOUNT


def ends_well(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.long
@pytest.mark.skipif(not CAN_MOUNT, reason="small file systems are mounted by root")
def test_full_and_read_only_disks_under_every_command() -> None:
    """Six full disks and a read-only one for each of 15 commands."""
    ends_well("tests.fuzz.disks", "--sizes", "6")


@pytest.mark.long
@pytest.mark.parametrize("name", ["class-run", "text-run"])
def test_fifty_kills(name: str) -> None:
    ends_well("tests.fuzz.kills", name, "--kills", "50")
