"""The table of what fits which card: its cells, and that docs/memory.md has the one the command prints."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import fit_table

from fewstep.families.registry import released_shapes

DOC = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8").splitlines()


def test_a_cell_names_the_smallest_card_with_a_tenth_left_free() -> None:
    gib = 2**30
    assert fit_table.cell(int(10.8 * gib)) == "10.8 (12)"
    assert fit_table.cell(int(10.81 * gib)) == "10.8 (16)"
    assert fit_table.cell(100 * gib) == "100.0 (none)"


def test_the_page_has_a_row_for_every_model_resolution_and_base() -> None:
    header = list(fit_table.header())
    first = DOC.index(header[0])
    assert DOC[first + 1] == header[1]
    assert fit_table.MODELS.keys() <= released_shapes().keys()
    expected = [
        f"| {title} | {side}x{side} | {base} |"
        for title in fit_table.MODELS.values() for side in fit_table.RESOLUTIONS for base in fit_table.BASES
    ]  # fmt: skip
    rows = DOC[first + 2 : first + 2 + len(expected)]
    assert [" | ".join(row.split(" | ")[:3]) + " |" for row in rows] == expected


@pytest.mark.slow
def test_the_page_says_what_the_command_prints() -> None:
    """The cheapest cell; the others take up to 20 s each."""
    (row,) = [line for line in DOC if line.startswith("| FLUX.2 klein 4B | 512x512 | nf4 |")]
    found = fit_table.cell(fit_table.peak("flux2-klein-4b", 512, "nf4", fit_table.COLUMNS[0]))
    assert row.split(" | ")[3] == found
