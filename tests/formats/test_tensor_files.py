"""Safetensors files of ours: the same bytes each time, for whoever the umask allows, and shapes without weights."""

import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fewstep.errors import UserError
from fewstep.formats.tensor_files import read_safetensors, tensor_names, tensor_shapes, write_tensor_file

TENSORS = {
    "b": torch.ones(3),
    "a": torch.zeros(2, 2).half(),
    "none": torch.zeros((), dtype=torch.int64).expand(0),
}  # of any stride
HEADER = {f"key{number}": f'{number} "é" \n \x01 \\' for number in range(20)}


def test_the_same_content_is_the_same_bytes(tmp_path: Path) -> None:
    files = set()
    for number in range(5):
        path = tmp_path / f"{number}.safetensors"
        write_tensor_file(path, TENSORS, dict(sorted(HEADER.items(), key=lambda item: hash((number, item)))))
        files.add(path.read_bytes())
    assert len(files) == 1
    tensors, header = read_safetensors(path)
    assert header == HEADER
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == HEADER
    assert tensor_shapes(path) == {"a": (2, 2), "b": (3,), "none": (0,)}


def test_the_bytes_are_the_librarys(tmp_path: Path) -> None:
    """Which wants all tensors at once; here each is made when its turn comes."""
    odd = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "z": odd, "B": odd.double(), "é": odd.half(), "a.1": odd.bfloat16(), "a.0": torch.tensor(3.0), "n": odd.long(), "i": odd.int(),
        "short": odd.short(), "byte": odd.byte(), "char": odd.char(), "yes": odd > 3, "c": odd.to(torch.complex64),
        "f8": odd.to(torch.float8_e4m3fn), "f5": odd.to(torch.float8_e5m2), "none": torch.zeros(0, 3), '"\n\x01': odd + 1,
        **{f"u{bits}": odd.to(kind) for bits, kind in ((16, torch.uint16), (32, torch.uint32), (64, torch.uint64))},
    }  # fmt: skip
    save_file(tensors, tmp_path / "library.safetensors", {"format": "pt"})
    alive: list[weakref.ref[torch.Tensor]] = []

    def one(tensor: torch.Tensor) -> torch.Tensor:
        assert all(made() is None for made in alive)
        alive.append(weakref.ref(made := tensor.clone()))
        return made

    strided = {name: value.mT.contiguous().mT if value.dim() > 1 else value for name, value in tensors.items()}
    write_tensor_file(tmp_path / "ours.safetensors", strided, {"format": "pt"}, whole=one)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()
    real = {name: value for name, value in tensors.items() if name != "c"}
    write_tensor_file(tmp_path / "half.safetensors", real, dtype=torch.float16)
    save_file(
        {name: value.half() for name, value in real.items() if name != "z"} | {"z": odd.half().clone()},
        tmp_path / "library.safetensors",
    )
    assert (tmp_path / "half.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_other_users_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for mask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(mask)
        try:
            write_tensor_file(path, TENSORS)
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == mode


def test_a_file_that_may_not_be_read_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors says "No such file"; root may read everything, so that the right is imitated."""
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"x\.safetensors cannot be read \(permission denied\); allow it with chmod"):
        tensor_names(tmp_path / "x.safetensors")
