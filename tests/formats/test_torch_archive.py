"""State dicts in torch.save's archives are read exactly as torch.load reads them; nothing else is read, or run."""

import io
import os
import pickle
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.formats.torch_archive import read_torch_archive, torch_archive_names
from tests.dmd2_files import write_torch_archive

DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.bool,
]  # fmt: skip


def tensors() -> "OrderedDict[str, Tensor]":
    torch.manual_seed(0)
    values: OrderedDict[str, Tensor] = OrderedDict()
    for dtype in DTYPES:
        values[f"layer.{dtype}"] = (torch.randn(3, 4) * 3).to(dtype)
    values["scalar"], values["empty"] = torch.tensor(2.5), torch.zeros(0, 3)
    values["transposed"], values["slice"] = torch.randn(4, 3).T, torch.arange(20.0)[3:9:2]
    values["parameter"], values["tied"] = nn.Parameter(torch.ones(2)), values["scalar"]
    values["x" * 300] = torch.ones(1)
    return values


def refused(path: Path, message: str = "") -> str:
    with pytest.raises(UserError) as caught:
        read_torch_archive(path)
    told = str(caught.value)
    assert str(path) in told
    assert message in told
    assert "\n" not in told
    return told


def test_reads_what_torch_load_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save(tensors(), path)
    expected, found = torch.load(path, weights_only=True, mmap=True), read_torch_archive(path)
    assert list(found) == list(expected) == torch_archive_names(path)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(found[name], value), name
        assert type(found[name]) is Tensor
        assert not found[name].requires_grad


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_module_state_dicts_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    state = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).state_dict()  # with _metadata
    torch.save(state, tmp_path / "a.bin", pickle_protocol=protocol)
    found = read_torch_archive(tmp_path / "a.bin")
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert found.keys() == state.keys()


def test_written_files_load_in_torch(tmp_path: Path) -> None:
    write_torch_archive(tmp_path / "a.bin", tensors())
    found = torch.load(tmp_path / "a.bin", weights_only=True)
    assert all(torch.equal(found[name], value) for name, value in tensors().items())


def test_reads_wrapped_state_dicts_and_only_wanted_tensors(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2), "b": torch.zeros(3)}, "epoch": 3}, tmp_path / "a.ckpt")
    assert list(read_torch_archive(tmp_path / "a.ckpt")) == ["a", "b"]
    assert list(read_torch_archive(tmp_path / "a.ckpt", lambda name: name == "b")) == ["b"]


@pytest.mark.parametrize("name", ["model", "ema", "module", "state_dict"])
def test_the_one_state_dict_beside_a_training_loops_state_is_read(tmp_path: Path, name: str) -> None:
    """As timm and others save them."""
    optimizer = {"state": {0: {"exp_avg": torch.zeros(1)}}, "param_groups": [{"lr": 1e-3}]}
    torch.save({name: {"a": torch.ones(2)}, "optimizer": optimizer, "epoch": 3, "arch": "unet"}, tmp_path / "a.pth")
    assert list(read_torch_archive(tmp_path / "a.pth")) == ["a"]
    torch.save({name: {"a": torch.ones(2)}, "discriminator": {"b": torch.ones(2)}}, tmp_path / "a.pth")
    assert list(read_torch_archive(tmp_path / "a.pth")) == ["a"]


@pytest.mark.parametrize("names", [("state_dict", "state_dict_ema"), ("model", "ema")])
def test_of_weights_and_their_average_none_is_guessed(tmp_path: Path, names: tuple[str, str]) -> None:
    torch.save({name: {"a": torch.ones(2)} for name in names}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", f"it holds several state dicts ({names[0]!r}, {names[1]!r})")


def test_unwanted_tensors_take_no_memory(tmp_path: Path) -> None:
    torch.save({"large": torch.zeros(5_000_000), "small": torch.ones(2)}, tmp_path / "a.bin")
    tracemalloc.start()
    found = read_torch_archive(tmp_path / "a.bin", lambda name: name == "small")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(found["small"], torch.ones(2))
    assert peak < 2_000_000


def test_names_that_share_a_tensor_do_not_multiply_it(tmp_path: Path) -> None:
    value = torch.zeros(100_000)
    torch.save({f"w{number}": value for number in range(50)}, tmp_path / "a.bin")
    found = read_torch_archive(tmp_path / "a.bin")
    assert len({tensor.data_ptr() for tensor in found.values()}) == 1
    torch.save({f"w{number}": value[number:] for number in range(50)}, tmp_path / "b.bin")
    refused(tmp_path / "b.bin", "its tensors are larger than the file")


# --- Damaged files


def rezip(source: Path, target: Path, change: Callable[[str, bytes], tuple[str, bytes] | None], **options: Any) -> Path:
    """A copy of an archive with changed entries."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for info in old.infolist():
            if (changed := change(info.filename, old.read(info))) is not None:
                new.writestr(*changed)
    return target


def with_pickle(path: Path, content: bytes) -> Path:
    """An archive whose data.pkl is something else."""
    torch.save({"w": torch.ones(4)}, path.with_suffix(".valid"))
    return rezip(path.with_suffix(".valid"), path, lambda n, d: (n, content if n.endswith("data.pkl") else d))


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    torch.save({"w": torch.ones(4), "v": torch.zeros(3)}, tmp_path / "valid.bin")
    return tmp_path / "valid.bin"


def test_refuses_truncated_files(tmp_path: Path, valid: Path) -> None:
    content, path = valid.read_bytes(), tmp_path / "cut.bin"
    for length in [*range(0, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:length])
        refused(path, "not a readable torch weights file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot mmap an empty file"),
        (b"hello, this is text", "starts neither like a zip archive"),
        (b"\x89PNG\r\n\x1a\n", "starts neither like a zip archive"),
        (b"PK\x03\x04 and so on", "not a zip file"),
        (pickle.dumps({"w": 1}), "but not one that torch.save wrote"),
    ],
)
def test_refuses_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "other.bin").write_bytes(content)
    refused(tmp_path / "other.bin", message)


@pytest.mark.parametrize("name", ["missing.bin", "."])
def test_refuses_a_path_that_is_no_file(tmp_path: Path, name: str) -> None:
    refused(tmp_path / name, "no such file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "it holds a list, not a state dict"),
        ({"epoch": 3}, "its entry 'epoch' is a int, not a tensor"),
        ({"optimizer": {"w": torch.ones(1)}}, "its entry 'optimizer' is a dict, not a tensor"),
        (nn.Linear(1, 1), "asks for the global 'torch.nn.modules.linear.Linear', which no state dict needs"),
        ({"w": torch.ones(1).to_sparse()}, "asks for the global 'torch._utils._rebuild_sparse_tensor'"),
        ({"w" * 600: torch.ones(1)}, "endless name"),
        ({1: torch.ones(1)}, "where a str belongs"),
    ],
)
def test_refuses_other_contents(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "other.bin")
    refused(tmp_path / "other.bin", message)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_refuses_programs_by_name(tmp_path: Path) -> None:
    """As `inception-2015-12-05.pt` is one."""
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "program.pt")
    refused(
        tmp_path / "program.pt",
        "it is a TorchScript program, and programs are not run; give the network's state dict (.pth)",
    )


def test_refuses_other_archives(tmp_path: Path, valid: Path) -> None:
    path = tmp_path / "other.bin"
    refused(rezip(valid, path, lambda n, d: (n, d), compression=zipfile.ZIP_DEFLATED), "compressed or encrypted")
    refused(rezip(valid, path, lambda n, d: (n, b"big") if n.endswith("byteorder") else (n, d)), "big-endian")
    refused(rezip(valid, path, lambda n, d: None if n.endswith("data.pkl") else (n, d)), "no single data.pkl")
    refused(rezip(valid, path, lambda n, d: None if n.endswith("data/1") else (n, d)), "no entry 'data/1'")
    refused(rezip(valid, path, lambda n, d: (n, d[:-4] if n.endswith("/data/0") else d)), "another size")
    refused(rezip(valid, path, lambda n, d: (f"deep/{n}", d)), "no single data.pkl at its top")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("b/data.pkl", b"")
    refused(path, "no single data.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/data.pkl", b"")
    refused(path, "two entries of one name")


def test_refuses_entries_that_are_not_where_the_index_says(tmp_path: Path, valid: Path) -> None:
    content = bytearray(valid.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 42 : entry + 46] = (7).to_bytes(4, "little")
    first = content.index(b"PK\x01\x02")
    content[first + 42 : first + 46] = (9).to_bytes(4, "little")
    (tmp_path / "moved.bin").write_bytes(content)
    refused(tmp_path / "moved.bin", "not where the index of its zip archive says")


# --- Hostile files


class Calls:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, __import__, open, torch.load, bytearray, io.open])
def test_refuses_every_other_function(tmp_path: Path, function: Any) -> None:
    canary = tmp_path / "canary"
    command = f"touch {canary}" if function is os.system else f"open({str(canary)!r}, 'w').close()"
    for value in (Calls(function, command), {"w": Calls(function, command)}, {"w": [Calls(function, command)]}):
        told = refused(with_pickle(tmp_path / "evil.bin", pickle.dumps(value, protocol=2)), "asks for the global")
        assert "nothing in it was executed" in told
    assert not canary.exists()
    if function in (os.system, eval):  # the same bytes do harm where they are unpickled
        pickle.loads(pickle.dumps(Calls(function, command)))
        assert canary.exists()


def test_refuses_archives_in_archives_and_pickles_in_storages(tmp_path: Path) -> None:
    """A hostile pickle where a tensor's elements belong is elements; as a second data.pkl it is refused."""
    canary = tmp_path / "canary"
    evil = pickle.dumps(Calls(os.system, f"touch {canary}"), protocol=2)
    evil += b"\0" * (-len(evil) % 4)
    torch.save({"w": torch.frombuffer(bytearray(evil), dtype=torch.float32)}, tmp_path / "hidden.bin")
    assert len(read_torch_archive(tmp_path / "hidden.bin")["w"]) == len(evil) // 4
    inner = with_pickle(tmp_path / "evil.bin", evil).read_bytes()
    with zipfile.ZipFile(tmp_path / "outer.bin", "w") as archive:
        archive.writestr("outer/data.pkl", inner)
    refused(tmp_path / "outer.bin")
    (tmp_path / "appended.bin").write_bytes((tmp_path / "evil.valid").read_bytes() + inner)
    refused(tmp_path / "appended.bin")
    assert not canary.exists()


@pytest.mark.slow
def test_a_file_of_a_kilobyte_allocates_no_gigabyte(tmp_path: Path) -> None:
    """torch.load(weights_only=True) makes the three gigabytes that the first of these asks for."""
    large = [
        pickle.dumps({"w": Calls(bytearray, 3 * 10**9)}, protocol=2),
        b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b".",
        b"\x80\x02Nr\xff\xff\xff\xff.",
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    ]
    tracemalloc.start()
    for content in large:
        refused(with_pickle(tmp_path / "large.bin", content))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000_000


@pytest.mark.slow
def test_endless_pickles_end(tmp_path: Path) -> None:
    start = time.monotonic()
    refused(with_pickle(tmp_path / "endless.bin", b"\x80\x02" + b"N" * 1_100_000 + b"."), "more pieces")
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(1, (4,), (1,)), (0, (5,), (1,)), (0, (2**38,), (0,)), (-1, (1,), (1,)), (0, (2, 2), (1,)), (0, (True,), (1,))],
)
def test_refuses_tensors_outside_their_storage(tmp_path: Path, offset: Any, size: Any, stride: Any) -> None:
    class Rebuilt:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Stored(), offset, size, stride, False, OrderedDict())

    class Stored:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(value, Stored) else None

    out = io.BytesIO()
    Pickler(out, protocol=2).dump({"w": Rebuilt()})
    refused(with_pickle(tmp_path / "a.bin", out.getvalue()), "tensor")
