"""Tensors in one or several files, read row by row."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewstep.errors import UserError
from fewstep.formats.stored_tensors import find_indexed, find_tensors

TENSORS = {"wide": torch.randn(5, 3), "scale": torch.tensor(2.0), "half": torch.randn(4).half()}


def two_files(folder: Path) -> Path:
    """As diffusers stores a large network."""
    where = {"wide": "a-00001-of-00002.safetensors", "scale": "a-00002-of-00002.safetensors"}
    where["half"] = where["scale"]
    for file in set(where.values()):
        save_file({name: TENSORS[name] for name in where if where[name] == file}, folder / file)
    index = folder / "a.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    return index


def test_rows_are_those_of_the_tensor(tmp_path: Path) -> None:
    found = find_indexed(two_files(tmp_path)).prefixed("network.")
    assert found.shapes == {f"network.{name}": tuple(value.shape) for name, value in TENSORS.items()}
    assert found.are_floats
    with found.opened() as read:
        for name, value in TENSORS.items():
            whole = read(f"network.{name}", None)
            assert whole.dtype == value.dtype
            assert torch.equal(whole, value)
        for rows in (slice(0, 2), slice(4, 5), slice(5, 5)):
            assert torch.equal(read("network.wide", rows), TENSORS["wide"][rows])


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3)}, tmp_path / "a.safetensors")
    assert not find_tensors([tmp_path / "a.safetensors"]).are_floats


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    index = two_files(tmp_path)
    first = tmp_path / "a-00001-of-00002.safetensors"
    with pytest.raises(UserError, match="both have wide; download"):
        find_tensors([first, first])
    save_file({"other": TENSORS["wide"]}, first)
    with pytest.raises(UserError, match="its files hold other tensors than it says"):
        find_indexed(index)
    first.write_bytes(b"no file of this kind")
    with pytest.raises(UserError, match=r"a-00001-of-00002\.safetensors cannot be read as safetensors"):
        find_indexed(index)
    for wrong in ({}, {"weight_map": {"wide": "../a.safetensors"}}, {"weight_map": {"wide": 3}}):
        index.write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(UserError, match="its weight_map does not say the file of each tensor"):
            find_indexed(index)
