"""One sentence about tensors that belong to another network."""

import pytest
import torch

from fewstep.errors import UserError
from fewstep.formats.compare import compare_state

EXPECTED = {"a": (2, 3), "b": (4,), "c": (1,), "d": (5,)}


def test_the_same_tensors_pass_whatever_device() -> None:
    compare_state({name: torch.empty(shape, device="meta") for name, shape in EXPECTED.items()}, EXPECTED, "U-Net", "x")


def test_every_difference_is_counted_and_some_are_named() -> None:
    with pytest.raises(UserError) as caught:
        compare_state({"a": torch.zeros(3, 2), "e": torch.zeros(1)}, EXPECTED, "U-Net", "x.bin", "give its base")
    assert str(caught.value) == (
        "x.bin: its U-Net is another network than expected: of its tensors, 3 missing (e.g. b, c, and 1 more), "
        "1 unexpected (e), 1 of another shape (a (3, 2) for (2, 3)); give its base"
    )
