"""EDM pickles are read exactly; a damaged or hostile file ends in a ValueError, having run nothing."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import time
import tracemalloc
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.formats.edm_pickle import plain_value, read_edm_pickle
from fewstep.formats.edm_pickle_writer import write_edm_pickle

KWARGS = {
    "img_resolution": 16,
    "img_channels": 3,
    "label_dim": 10,
    "sigma_data": 0.5,
    "use_fp16": False,
    "model_type": "DhariwalUNet",
    "model_channels": 32,
    "channel_mult": [1, 4],
    "attn_resolutions": (8,),
    "augment": {"p": 0.12, "name": None},
}
EXECUTED_NOTHING = "nothing in it was executed"


def network_tensors() -> dict[str, Tensor]:
    """Keys of every kind an EDM network has."""
    torch.manual_seed(0)
    return {
        "model.map_noise.freqs": torch.randn(4),
        "model.map_layer0.weight": torch.randn(8, 4),
        "model.map_layer0.bias": torch.randn(8),
        "model.enc.16x16_conv.weight": torch.randn(8, 3, 3, 3).half(),
        "model.enc.8x8_down.conv0.resample_filter": torch.full((1, 1, 2, 2), 0.25),
        "model.dec.8x8_in0.qkv.weight": torch.randn(24, 8, 1, 1).bfloat16(),
        "model.dec.8x8_in0.norm2.scale": torch.tensor(3.0, dtype=torch.float64),
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert type(actual[key]) is Tensor
        assert actual[key].dtype == tensor.dtype
        assert not actual[key].requires_grad
        assert actual[key].is_contiguous()
        assert torch.equal(actual[key], tensor), key


# --- The writer


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "teacher.pkl"
    write_edm_pickle(path, network_tensors(), KWARGS)
    result = read_edm_pickle(path)
    assert_same(result.state_dict, network_tensors())
    assert (result.class_name, result.init_args, result.init_kwargs) == ("EDMPrecond", (), KWARGS)
    assert isinstance(result.init_kwargs["attn_resolutions"], tuple)
    assert [entry.name for entry in tmp_path.iterdir()] == ["teacher.pkl"]


def test_writer_writes_what_a_tensor_shows_and_not_what_it_views(tmp_path: Path) -> None:
    base = torch.arange(10_000.0).reshape(100, 100)
    write_edm_pickle(tmp_path / "view.pkl", {"model.w": base.T[3:5, ::2]}, {})
    assert_same(read_edm_pickle(tmp_path / "view.pkl").state_dict, {"model.w": base.T[3:5, ::2]})
    assert (tmp_path / "view.pkl").stat().st_size < 2_000


def test_written_file_has_the_structure_of_edm(tmp_path: Path, edm_modules: types.ModuleType) -> None:
    write_edm_pickle(tmp_path / "a.pkl", network_tensors(), KWARGS, class_name="VPPrecond")
    edm_modules.__dict__["_reconstruct_persistent_obj"] = lambda meta: types.SimpleNamespace(**meta)
    with (tmp_path / "a.pkl").open("rb") as file:
        root = pickle.load(file)["ema"]
    assert sorted(vars(root)) == ["class_name", "module_src", "state", "type", "version"]
    assert (root.type, root.module_src, root.class_name) == ("class", "", "VPPrecond")
    assert (root.state["_init_kwargs"], root.state["_init_args"]) == (KWARGS, ())
    model = root.state["_modules"]["model"]
    assert model.class_name == "DhariwalUNet"
    down = model.state["_modules"]["enc"].state["_modules"]["8x8_down"].state["_modules"]["conv0"].state
    assert (list(down["_buffers"]), list(down["_parameters"])) == (["resample_filter"], [])
    assert list(model.state["_modules"]["map_noise"].state["_buffers"]) == ["freqs"]
    assert isinstance(model.state["_modules"]["map_layer0"].state["_parameters"]["weight"], nn.Parameter)


def test_writer_leaves_imports_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = types.ModuleType("torch_utils")
    monkeypatch.setitem(sys.modules, "torch_utils", theirs)
    monkeypatch.delitem(sys.modules, "torch_utils.persistence", raising=False)
    write_edm_pickle(tmp_path / "a.pkl", network_tensors(), KWARGS)
    assert sys.modules["torch_utils"] is theirs
    assert "torch_utils.persistence" not in sys.modules


@pytest.mark.parametrize(
    ("tensors", "kwargs", "message"),
    [
        ({}, {}, "state_dict is empty"),
        ({"model.w": [1.0]}, {}, r"state_dict\['model.w'\] is a list"),
        ({"model.w": torch.ones(1)}, {"f": open}, "constructor arguments hold"),
        ({"model.w": torch.ones(1)}, {"f": {1: 2}}, "a int where a str belongs"),
    ],
)
def test_writer_refuses(tmp_path: Path, tensors: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_edm_pickle(tmp_path / "a.pkl", tensors, kwargs)
    assert not list(tmp_path.iterdir())


def test_plain_value_copies() -> None:
    value = {"a": [1, (2.0, None)], "b": True}
    copy = plain_value(value)
    assert copy == value
    assert copy["a"] is not value["a"]


# --- Files as EDM writes them: real modules under the real names, through the standard library's pickle


class EasyDict(dict[str, Any]):
    """Stands for dnnlib.util.EasyDict: a dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
    raise AssertionError("a reader must not call this")


EasyDict.__module__ = "dnnlib.util"
_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent(nn.Module):
    """Pickles as one call on its class name, source text and state."""

    source = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self._init_args = args
        self._init_kwargs = kwargs

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = super().__reduce_ex__(protocol)[2]
        meta = EasyDict(type="class", version=6, module_src=self.source, class_name="EDMPrecond", state=state)
        return _reconstruct_persistent_obj, (meta,)


class Conv(Persistent):
    def __init__(self, channels: int) -> None:
        super().__init__(in_channels=channels, kernel=3)
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3))
        self.bias = None
        self.register_parameter("unused", None)
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25) if channels > 2 else None)
        self.register_buffer("cache", torch.zeros(2), persistent=False)


@pytest.fixture
def edm_modules(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Modules under EDM's names for as long as the test runs: pickle.dump needs them, the reader must not."""
    for value in (EasyDict, _reconstruct_persistent_obj):
        module = types.ModuleType(value.__module__)
        module.__dict__[value.__name__] = value
        monkeypatch.setitem(sys.modules, value.__module__.partition(".")[0], types.ModuleType("parent"))
        monkeypatch.setitem(sys.modules, value.__module__, module)
    return module


def edm_network() -> Persistent:
    torch.manual_seed(1)
    root = Persistent(16, img_channels=3, model_kwargs=EasyDict(channel_mult=[1, 2]))
    root.model = Persistent()
    root.model.enc = nn.ModuleDict({"16x16_conv": Conv(2), "8x8_down": Conv(3)})
    root.model.dec = nn.ModuleDict({"8x8_in0": Conv(4).half()})
    return root


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_reads_what_pickle_dump_writes(tmp_path: Path, edm_modules: types.ModuleType, protocol: int) -> None:
    path, canary = tmp_path / "snapshot.pkl", tmp_path / "canary"
    network = edm_network()
    network.source = f"open({str(canary)!r}, 'w').close()"
    snapshot = {
        "ema": network.eval(),
        "loss_fn": Persistent(P_mean=-1.2),
        "augment_pipe": None,
        "dataset_kwargs": EasyDict(class_name="training.dataset.ImageFolderDataset", max_size=None),
    }
    with path.open("wb") as file:
        pickle.dump(snapshot, file, protocol=protocol)
    for name in ["torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"]:
        del sys.modules[name]
    result = read_edm_pickle(str(path))
    expected = {key: value.detach() for key, value in network.state_dict().items()}
    assert list(result.state_dict) == list(expected)
    assert_same(result.state_dict, expected)
    assert result.init_args == (16,)
    assert result.init_kwargs == {"img_channels": 3, "model_kwargs": {"channel_mult": [1, 2]}}
    assert type(result.init_kwargs["model_kwargs"]) is dict
    assert not canary.exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_reads_views_and_every_dtype(tmp_path: Path, edm_modules: types.ModuleType, dtype: torch.dtype) -> None:
    network = edm_network()
    network.register_buffer("view", (torch.arange(24).reshape(2, 3, 4) % 2).to(dtype).permute(2, 0, 1)[1:])
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": network}))
    assert_same({"view": read_edm_pickle(tmp_path / "a.pkl").state_dict["view"]}, {"view": network.view})


# --- Damaged files


def refuse(path: Path, content: bytes, message: str | None = None) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_edm_pickle(path)
    assert str(path) in str(caught.value)
    assert EXECUTED_NOTHING in str(caught.value)


@pytest.fixture
def valid(tmp_path: Path) -> bytes:
    write_edm_pickle(tmp_path / "valid.pkl", network_tensors(), KWARGS)
    return (tmp_path / "valid.pkl").read_bytes()


def test_refuses_truncated_files(tmp_path: Path, valid: bytes) -> None:
    for length in [*range(0, len(valid), len(valid) // 80), len(valid) - 1]:
        refuse(tmp_path / "cut.pkl", valid[:length])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"hello, this is text", "does not start like a pickle"),
        (b"PK\x03\x04 and so on", "zip archive"),
        (pickle.dumps({"ema": 1}, protocol=0), "does not start like a pickle"),
        (b"\x80\x04", "exhausted"),
        (b"\x80\x04.", "damaged"),
        (pickle.dumps([1, 2]), r"no 'ema' network \(found: a list\)"),
        (pickle.dumps({}), r"no 'ema' network \(found: nothing\)"),
        (pickle.dumps({"G_ema": 1, "D": 2}), r"no 'ema' network \(found: G_ema, D\)"),
        (pickle.dumps({"ema": {"weight": 1}}), "no 'ema' network"),
        (pickle.dumps({1: 2}), "a int where a str belongs"),
        (pickle.dumps({"ema": torch.ones(2)}), "no 'ema' network"),
        (pickle.dumps({"ema": nn.ModuleDict()}), "not saved as a persistent EDM module"),
        (pickle.dumps({"ema": nn.Linear(1, 1)}), r"global 'torch.nn.modules.linear.Linear'"),
    ],
)
def test_refuses_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    refuse(tmp_path / "other.pkl", content, message)


@pytest.mark.parametrize("name", ["missing.pkl", "."])
def test_refuses_a_path_that_is_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no such file") as caught:
        read_edm_pickle(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


# --- Hostile files


class Calls:
    """Pickles as a call of the function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def code(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


def data(value: bytes) -> bytes:
    return pickle.BINBYTES + struct.pack("<I", len(value)) + value


def program(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + pickle.STOP


def body(value: object) -> bytes:
    """The opcodes of a plain value, without header and stop, and without memo entries."""
    out = io.BytesIO()
    pickler = pickle.Pickler(out, protocol=3)
    pickler.fast = True
    pickler.dump(value)
    return out.getvalue()[2:-1]


RECONSTRUCT = code("torch_utils.persistence", "_reconstruct_persistent_obj")
LOAD = code("torch.storage", "_load_from_bytes")
REBUILD = code("torch._utils", "_rebuild_tensor_v2")
TUPLE1, REDUCE, BUILD = pickle.TUPLE1, pickle.REDUCE, pickle.BUILD


def storage_archive(numel: int = 6) -> bytes:
    out = io.BytesIO()
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.ones(numel).untyped_storage(), dtype=torch.float32, _internal=True
    )
    torch.save(storage, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def storage(archive: bytes) -> bytes:
    return LOAD + data(archive) + TUPLE1 + REDUCE


def tensor(offset: object, size: object, stride: object, source: bytes | None = None) -> bytes:
    """A tensor of the storage that the opcodes in `source` leave on the stack."""
    args = body(offset) + body(size) + body(stride) + body(False) + b"}"
    return REBUILD + b"(" + (source or storage(storage_archive())) + args + b"t" + REDUCE


def module(*, parameters: bytes = b"}", modules: bytes = b"}", kwargs: bytes = b"}") -> bytes:
    state = text("_parameters") + parameters + text("_modules") + modules + text("_init_kwargs") + kwargs
    meta = text("class_name") + text("EDMPrecond") + text("state") + b"}(" + state + b"u"
    return RECONSTRUCT + b"}(" + meta + b"u" + TUPLE1 + REDUCE


def item(name: str, value: bytes) -> bytes:
    return b"}" + text(name) + value + b"s"


def network(**parts: bytes) -> bytes:
    return program(item("ema", module(**parts)))


WEIGHTS = {"parameters": item("w", tensor(0, (2, 3), (3, 1)))}


def test_hand_written_pickle_is_valid(tmp_path: Path) -> None:
    """Or the refusals below would prove little."""
    (tmp_path / "a.pkl").write_bytes(network(**WEIGHTS))
    assert_same(read_edm_pickle(tmp_path / "a.pkl").state_dict, {"w": torch.ones(2, 3)})


@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, __import__, open, torch.load, io.open])
def test_refuses_every_other_function(tmp_path: Path, function: Any) -> None:
    canary = tmp_path / "canary"
    command = f"touch {canary}" if function is os.system else f"open({str(canary)!r}, 'w').close()"
    evil = pickle.dumps(Calls(function, command))
    refuse(tmp_path / "evil.pkl", evil, "asks for the global")
    refuse(tmp_path / "evil.pkl", pickle.dumps({"ema": [Calls(function, command)]}), "asks for the global")
    hidden = network(parameters=item("w", storage(evil)))
    refuse(tmp_path / "evil.pkl", hidden, "asks for the global")
    late = storage_archive().replace(b"ctorch\nFloatStorage\n", evil[2:-1])
    refuse(tmp_path / "evil.pkl", network(parameters=item("w", storage(late))), "asks for the global")
    assert not canary.exists()
    if function in (os.system, eval):  # the same bytes do harm where they are unpickled
        pickle.loads(evil)
        assert canary.exists()


@pytest.mark.parametrize(
    "content",
    [
        program(code("collections", "OrderedDict"), item("__init__", b"N"), BUILD),
        program(code("collections", "OrderedDict"), b"N}", text("update"), b"Ns", pickle.TUPLE2, BUILD),
        program(RECONSTRUCT, item("__code__", b"N"), BUILD),
        program(LOAD, item("__globals__", b"}"), BUILD),
        program(code("collections", "OrderedDict.fromkeys"), text("a"), TUPLE1, REDUCE),
        program(code("torch.storage", "_load_from_bytes.__globals__")),
        program(code("collections", "OrderedDict"), body(([1],)), REDUCE),
        program(code("dnnlib.util", "EasyDict"), body(([1],)), pickle.NEWOBJ),
        program(code("builtins", "set"), body(([1],)), REDUCE),
        program(RECONSTRUCT, body(("x",)), REDUCE),
        program(RECONSTRUCT, body(({"state": {}},)), REDUCE),
        program(RECONSTRUCT, body(({"class_name": "a", "state": []},)), REDUCE),
        program(LOAD, body((5,)), REDUCE),
        program(text("os.system"), body(("true",)), REDUCE),
        program(storage(storage_archive()), TUPLE1, TUPLE1, REDUCE),
        program(tensor(0, (6,), (1,)), item("grad_fn", b"N"), BUILD),
        program(b"(", text("true"), b"ios\nsystem\n"),
        program(b"(", code("os", "system"), text("true"), b"o"),
        program(b"Pfile\n"),
        program(b"\x82\x01"),
        program(b"]", body({"a": 1}), BUILD),
        program(b"]", text("a"), text("b"), b"s"),
        program(b"}", text("a"), b"a"),
        program(b"}(", text("a"), b"u"),
        program(b"h\x05"),
        program(b"t"),
        program(b"0"),
    ],
)
def test_refuses_abuse_of_what_is_allowed(tmp_path: Path, content: bytes) -> None:
    names = set(vars(OrderedDict)), set(vars(torch.storage._load_from_bytes))
    refuse(tmp_path / "abuse.pkl", content)
    assert names == (set(vars(OrderedDict)), set(vars(torch.storage._load_from_bytes)))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (1, (6,), (1,)),
        (0, (7,), (1,)),
        (0, (2, 3), (4, 1)),
        (0, (2**38,), (0,)),
        (6, (), ()),
        (-1, (1,), (1,)),
        (0, (-1,), (1,)),
        (5, (2,), (-1,)),
        (0, (2, 3), (1,)),
        (0, (True,), (1,)),
        (0, (2.0,), (1,)),
        (0, [6], [1]),
        (0, (2**70,), (0,)),
        (0, (1,) * 9, (1,) * 9),
        (None, (6,), (1,)),
    ],
)
def test_refuses_tensors_outside_their_storage(tmp_path: Path, offset: Any, size: Any, stride: Any) -> None:
    refuse(tmp_path / "a.pkl", network(parameters=item("w", tensor(offset, size, stride))), "tensor|tuple")


@pytest.mark.parametrize(
    "archive",
    [
        b"",
        storage_archive()[:-1],
        storage_archive() + b"\0",
        storage_archive()[:-32],
        storage_archive().replace(b"\x06\0\0\0\0\0\0\0", b"\x07\0\0\0\0\0\0\0"),
        storage_archive().replace(b"K\x06N", b"\x8a\x08\0\0\0\0\0\0\0\x10N"),
        storage_archive().replace(b"\xfc\x9c", b"\xfc\x9d"),
        storage_archive().replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
        storage_archive().replace(b"FloatStorage", b"DoubleStorage"),
        b"PK\x03\x04" + bytes(40),
    ],
)
def test_refuses_damaged_storages(tmp_path: Path, archive: bytes) -> None:
    assert archive != storage_archive()
    refuse(tmp_path / "a.pkl", network(parameters=item("w", tensor(0, (6,), (1,), storage(archive)))))


def items(named: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in named.items()) + b"u"


def test_tensors_may_not_outgrow_the_file(tmp_path: Path) -> None:
    """Many tensors on one large storage are refused; one tensor under many names is no copy."""
    first = tensor(0, (100_000,), (1,), storage(storage_archive(100_000)) + b"q\x01")
    copies = {f"w{i}": tensor(0, (100_000,), (1,), b"h\x01") for i in range(9)}
    refuse(tmp_path / "a.pkl", network(parameters=items({"w": first, **copies})), "larger than the file")
    names = {f"w{i}": b"h\x02" for i in range(9)}
    (tmp_path / "a.pkl").write_bytes(network(parameters=items({"w": first + b"q\x02", **names})))
    state = read_edm_pickle(tmp_path / "a.pkl").state_dict
    assert len(state) == 10
    assert len({value.data_ptr() for value in state.values()}) == 1


def put(index: int) -> bytes:
    return b"q" + bytes([index])


def get(index: int) -> bytes:
    return b"h" + bytes([index])


def doubled(times: int, innermost: bytes, wrap: Any) -> bytes:
    """A value that holds, twice, a value that holds, twice, ..."""
    value = innermost + put(0)
    for index in range(times):
        value = wrap(items({"a": value, "b": get(index)})) + put(index + 1)
    return value


def nested(times: int) -> bytes:
    value = module()
    for _ in range(times):
        value = module(modules=item("m", value))
    return value


MANY = 200_000
LOOP = items({"ema": module(modules=b"}" + put(0)) + put(1), "rest": get(0) + text("m") + get(1) + b"s"})
ENDLESS = {
    "lists": (program(b"]" * MANY, b"a" * (MANY - 1)), "no 'ema'"),
    "tuples": (program(b")", TUPLE1 * MANY), "no 'ema'"),
    "a tuple as key": (program(b"}", b")", TUPLE1 * MANY, b"Ns"), "where a str belongs"),
    "a tuple in a set": (program(b"\x8f(", b")", TUPLE1 * MANY, b"\x90"), "where a str belongs"),
    "marks": (program(b"(" * MANY, b"t" * MANY), "no 'ema'"),
    "opcodes": (program(b"N" * 2_500_000), "more pieces"),
    "modules": (program(item("ema", nested(40))), "more than 32 deep"),
    "modules in themselves": (program(LOOP), "more than 32 deep"),
    "modules twice each": (
        program(item("ema", doubled(29, module(), lambda x: module(modules=x)))),
        "pieces",
    ),
    "arguments in themselves": (
        network(**WEIGHTS, kwargs=b"}" + put(0) + text("k") + get(0) + b"s"),
        "32 deep",
    ),
    "arguments twice each": (network(**WEIGHTS, kwargs=doubled(29, b"}", lambda x: x)), "pieces"),
    "a name": (network(parameters=item("n" * 300, tensor(0, (6,), (1,)))), "too long"),
    "a path": (program(item("ema", module(modules=item("n" * 300, module(**WEIGHTS))))), "endless names"),
    "storages in storages": (program(storage(program(storage(program(b"N"))))), "global 'torch.storage"),
    "one set again and again": (
        program(
            b"]" + put(0) + b"(" + b"X\0\0\0\0" * 1000 + b"e",
            (code("builtins", "set") + get(0) + TUPLE1 + REDUCE) * 9000,
        ),
        "pieces",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENDLESS)
def test_refuses_what_would_never_end(tmp_path: Path, kind: str) -> None:
    start = time.monotonic()
    refuse(tmp_path / "endless.pkl", *ENDLESS[kind])
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "content",
    [
        program(b"\x8e" + struct.pack("<Q", 2**60)),
        program(b"\x8d" + struct.pack("<Q", 2**50)),
        program(b"\x95" + struct.pack("<Q", 2**60)),
        program(b"\x8b" + struct.pack("<i", 2**31 - 1)),
        program(b"B" + struct.pack("<I", 2**32 - 1)),
        program(b"Nr" + struct.pack("<I", 2**32 - 1)),
        program(b"\x96" + struct.pack("<Q", 2**60)),
        network(parameters=item("w", storage(b"\x80\x02\x8e" + struct.pack("<Q", 2**60)))),
    ],
)
def test_announced_lengths_allocate_nothing(tmp_path: Path, content: bytes) -> None:
    tracemalloc.start()
    try:
        refuse(tmp_path / "large.pkl", content)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_tensor_may_be_shared_and_a_constructor_argument_repeated(tmp_path: Path) -> None:
    """The limits above are on the size of what is read; references as such are fine."""
    kwargs = items({"a": b"](K\x01K\x02e" + put(7), "b": get(7)})
    parameters = items({"w": tensor(0, (6,), (1,)) + put(8), "v": get(8)})
    (tmp_path / "a.pkl").write_bytes(network(parameters=parameters, kwargs=kwargs))
    result = read_edm_pickle(tmp_path / "a.pkl")
    assert result.init_kwargs == {"a": [1, 2], "b": [1, 2]}
    assert list(result.state_dict) == ["w", "v"]
