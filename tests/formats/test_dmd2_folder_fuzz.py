"""Structurally mutated `.bin` files: each is read or refused in one sentence; none runs or runs away."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.formats.dmd2_folder import read_dmd2
from tests.mutations import ARCHIVE_MUTATIONS, assert_read_or_refused


def state() -> dict[str, Tensor]:
    """The least that passes for an EDM generator."""
    torch.manual_seed(0)
    names = ("map_layer0.weight", "enc.8x8_conv.weight", "out_conv.bias", "karras_sigmas")
    return {f"model.{name}": torch.randn(4, 4) for name in names}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "valid.bin")
    assert read_dmd2(tmp_path / "valid.bin").layout == "edm"

    def check(found: Any, path: Path) -> None:
        assert all(type(tensor) is Tensor for tensor in found.generator.values())
        assert sum(tensor.nbytes for tensor in found.generator.values()) <= path.stat().st_size

    valid = (tmp_path / "valid.bin").read_bytes()
    assert_read_or_refused(tmp_path, "pytorch_model.bin", valid, ARCHIVE_MUTATIONS, read_dmd2, check=check)
