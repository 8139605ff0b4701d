"""The benchmark of keyed draws runs and says what it measured."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import draws


def test_each_part_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    found = draws.main(["--batch", "2", "--shape", "1", "8", "8", "--repeats", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| 2 x 1 x 8 x 8, ms | least | median of 2 |"
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == list(found)
    assert len(found) == 5
    assert all(0 < least <= middle for least, middle in found.values())
