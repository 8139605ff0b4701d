"""Untrained students measured for their steps."""

import math
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import starts


def test_each_list_of_steps_has_a_line_and_its_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "starts.png"
    found = starts.main(["999", "650 400", "--num-images", "130", "--picture", str(picture)])
    assert list(found) == ["999", "650 400"]
    assert math.inf > found["999"] > found["650 400"] > 0  # one forward from noise alone draws the mean of a class
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("| 999 | 80 | ")
    assert lines[-1] == f"| 650 400 | 8.63 | {found['650 400']:.2f} |"
    with Image.open(picture) as drawn:
        assert drawn.width > 600
