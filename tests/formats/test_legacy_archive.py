"""torch.save's files from before its zip archives: read as data, whatever they claim, within the memory they deserve."""

import io
import pickle
import resource
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.formats.torch_archive import read_torch_archive, torch_archive_names

MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def some_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    matrix = torch.randn(4, 6)
    return {
        "whole": matrix, "turned": matrix.T, "row": matrix[2], "half": torch.randn(3).half(), "empty": torch.empty(0, 2),
        "count": torch.tensor(7), "flags": torch.tensor([True, False]),
    }  # fmt: skip


def saved(path: Path, content: object) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def test_reads_what_torch_wrote(tmp_path: Path) -> None:
    tensors = some_tensors()
    path = saved(tmp_path / "a.pth", tensors)
    found = read_torch_archive(path)
    assert list(found) == list(tensors) == torch_archive_names(path)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    assert list(read_torch_archive(path, lambda name: name == "row")) == ["row"]


def test_reads_parameters_module_states_and_wrappings(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    for content in (layer.state_dict(), dict(layer.named_parameters()), {"state_dict": layer.state_dict(), "epoch": 3}):
        found = read_torch_archive(saved(tmp_path / "a.pth", content))
        assert torch.equal(found["weight"], layer.weight)


def old_file(reference: Callable[[type], tuple[object, ...]] | None = None) -> bytes:
    """As torch 0.1 to 0.3 wrote parameters: `_rebuild_tensor`, and a Parameter whose state is a tuple."""
    stream = io.BytesIO()
    for part in (MAGIC, 1001, SYSTEM):
        pickle.dump(part, stream, protocol=2)
    # Parameter.__new__() then BUILD with (tensor, True, hooks): written by hand, for no torch of today does it
    tensor = (
        b"ctorch._utils\n_rebuild_tensor\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00kX\x03\x00\x00\x00cpu"
        b"K\x04NtQK\x00K\x02K\x02\x86K\x02K\x01\x86tR"
    )
    stream.write(
        b"\x80\x02ccollections\nOrderedDict\n]\x85R(X\x01\x00\x00\x00w"
        + b"ctorch.nn.parameter\nParameter\n"
        + tensor
        + b"\x85\x81(\x88\x89}tbX\x01\x00\x00\x00v"
        + tensor
        + b"u."
    )
    pickle.dump(["k"], stream, protocol=2)
    stream.write(struct.pack("<q", 4) + torch.arange(4.0).numpy().tobytes())
    return stream.getvalue()


def test_reads_the_parameters_of_torch_before_0_4(tmp_path: Path) -> None:
    (tmp_path / "vgg.pth").write_bytes(old_file())
    found = read_torch_archive(tmp_path / "vgg.pth")
    assert found.keys() == {"w", "v"}
    assert torch.equal(found["w"], torch.arange(4.0).reshape(2, 2))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (struct.pack("<q", 24), struct.pack("<q", 25), "damaged tensor storage"),
        (b"\x88X", b"\x89X", "big-endian"),
        (b"torch\nFloatStorage", b"posix\nsystem", "posix.system"),
    ],
)
def test_damage_and_strange_calls_are_named(tmp_path: Path, old: bytes, new: bytes, reason: str) -> None:
    data = saved(tmp_path / "a.pth", {"whole": torch.zeros(4, 6)}).read_bytes()
    assert old in data
    (tmp_path / "b.pth").write_bytes(data.replace(old, new, 1))
    with pytest.raises(UserError, match=rf"b\.pth: not a readable torch weights file: .*{reason}"):
        read_torch_archive(tmp_path / "b.pth")


def test_a_small_file_cannot_take_much_memory(tmp_path: Path) -> None:
    """A storage of 2^40 numbers in a file of 300 bytes; `torch.load` allocates first and looks later."""
    stream = io.BytesIO()
    torch.save(OrderedDict(a=torch.zeros(1)), stream, _use_new_zipfile_serialization=False)
    data = stream.getvalue().replace(b"K\x01N", b"\x8a\x06\x00\x00\x00\x00\x00\x01N", 1)
    assert len(data) < 400
    (tmp_path / "bomb.pth").write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"bomb\.pth: not a readable torch weights file"):
        read_torch_archive(tmp_path / "bomb.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.slow
def test_every_garbled_file_is_read_or_refused(tmp_path: Path) -> None:
    data, random, path = saved(tmp_path / "a.pth", some_tensors()).read_bytes(), Random(0), tmp_path / "b.pth"
    for _ in range(200):
        garbled = bytearray(data[: random.randrange(1, len(data))] if random.random() < 0.3 else data)
        for _ in range(random.randrange(3)):
            garbled[random.randrange(len(garbled))] = random.randrange(256)
        path.write_bytes(garbled)
        try:
            read_torch_archive(path)
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017
