"""Reads EDM checkpoint pickles as inert data, because the ordinary way of loading runs code from the file."""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from fewstep.errors import UserError

_DICTS = frozenset({"collections.OrderedDict", "dnnlib.util.EasyDict"})
# A network may keep its blocks in torch's own containers, which pickle as themselves.
_CONTAINERS = frozenset(f"torch.nn.modules.container.{n}" for n in ("ModuleDict", "ModuleList", "Sequential"))
_CALLS = frozenset(
    {
        "builtins.set",
        "torch_utils.persistence._reconstruct_persistent_obj",
        "torch.storage._load_from_bytes",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
    }
)
_STORAGE_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_STORAGE_VERSION = (0x1950A86A20F9469CFC6C, 1001)

# The largest released network takes a tenth of the steps; a file that asks for more is built to keep us busy.
_MAX_STEPS = 2_000_000
_MAX_ARGUMENTS = 10_000
_MAX_DEPTH = 32
_MAX_NAME = 256
_MAX_DIMS = 8
_MAX_STORAGE_HEADER = 4096
_NUMBERS = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"})
_TEXTS = frozenset({"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"})
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_T = TypeVar("_T")


@dataclass(frozen=True)
class EDMPickle:
    """What a network needs from an EDM checkpoint.

    Attributes:
        state_dict: CPU tensors under their torch names (`model.enc.64x64_conv.weight`), parameters and
            persistent buffers, detached, in the file's dtypes.
        init_kwargs: keyword arguments the preconditioning module was built with (`img_resolution`,
            `label_dim`, `model_type`, ...): plain Python values.
        init_args: its positional arguments, usually empty.
        class_name: the preconditioning class, for example `EDMPrecond`.
    """

    state_dict: dict[str, Tensor]
    init_kwargs: dict[str, Any]
    init_args: tuple[Any, ...]
    class_name: str


def read_edm_pickle(path: str | Path) -> EDMPickle:
    """Read the `ema` network of an EDM checkpoint without executing anything in the file.

    No class is looked up and no function of the file's choosing is called: names of globals stay names, the
    few calls an EDM network consists of become records, and the source text in `module_src` is ignored.
    Needs about twice the file's size in memory.

    Source: METHOD.md section 7 for the layout; the documentation of Python's `pickletools` for the opcodes.

    Raises:
        UserError (a ValueError): the file is missing, truncated, not an EDM pickle, has no `ema` network, or
            asks for a global that no EDM network needs. The message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    try:
        # Mapped, because a read of the 2^60 bytes an opcode may announce then allocates only what there is.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
            _check_start(stream[:4])
            budget = _Budget(_MAX_STEPS)
            content = _InertMachine(_DICTS | _CONTAINERS | _CALLS, budget).run(stream)
            return _read_network(content, budget, max_bytes=len(stream))
    except Exception as error:
        known = isinstance(error, ValueError | OSError)
        reason = str(error) if known else f"it is damaged ({type(error).__name__}: {error})"
        told = f"{path}: not a readable EDM checkpoint: {reason}; nothing in it was executed"
        raise UserError(f"{told}. Download it again, or give another file") from error


def _check_start(start: bytes) -> None:
    if start.startswith(b"PK"):
        raise ValueError("this is a zip archive, as torch.save writes, not a pickle")
    if len(start) < 2 or start[0] != 0x80 or start[1] not in (3, 4, 5):
        raise ValueError("it does not start like a pickle of protocol 3, 4 or 5")


class _Budget:
    """Counts down over the whole file, so that no arrangement of references makes reading it endless."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def spend(self, steps: int = 1) -> None:
        self._left -= steps
        if self._left < 0:
            raise ValueError("it has more pieces than any EDM network")


# Records that stand for what the file asked to build. They compare by identity and hold no behaviour.
@dataclass(eq=False, repr=False, slots=True)
class _Global:
    name: str


@dataclass(eq=False, repr=False, slots=True)
class _PersistentId:
    value: object


@dataclass(eq=False, repr=False, slots=True)
class _Storage:
    dtype: torch.dtype
    data: memoryview

    @property
    def numel(self) -> int:
        return len(self.data) // self.dtype.itemsize


@dataclass(eq=False, repr=False, slots=True)
class _Tensor:
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements of the storage from the tensor's first to its last, both included."""
        if 0 in self.size:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))


@dataclass(eq=False, repr=False, slots=True)
class _Module:
    class_name: str
    state: dict[str, object]


class _InertMachine:
    """The pickle stack machine for the opcodes pickle.dump writes, except that nothing is imported or called.

    Built on `pickletools.genops`, not `pickle.Unpickler`: without asking any hook of a subclass, that lets a
    file allocate 64 GiB of memo in six bytes, and hash a key nested deep enough to end the process.
    """

    def __init__(self, allowed: frozenset[str], budget: _Budget) -> None:
        self._allowed = allowed
        self._budget = budget
        self._stack: list[object] = []
        self._marks: list[list[object]] = []
        self._memo: dict[object, object] = {}

    def run(self, stream: IO[bytes] | mmap.mmap) -> object:
        for opcode, arg, _ in pickletools.genops(stream):  # type: ignore[arg-type]  # mmap is a file where it matters
            self._budget.spend()
            if opcode.name == "STOP":
                break
            self._step(opcode.name, arg)
        return self._stack.pop()

    def _step(self, name: str, arg: object) -> None:
        stack = self._stack
        match name:
            case _ if name in _NUMBERS or name in _TEXTS:
                stack.append(arg)
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case _ if name in _EMPTY:
                stack.append(_EMPTY[name]())
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._marks.append(stack)
                self._stack = []
            case "TUPLE":
                items = self._pop_mark()
                self._stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "APPEND":
                item = stack.pop()
                _expect(list, stack[-1]).append(item)
            case "APPENDS":
                items = self._pop_mark()
                _expect(list, self._stack[-1]).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _expect(dict, stack[-1])[_expect(str, key)] = value
            case "SETITEMS":
                items = self._pop_mark()
                keys = [_expect(str, key) for key in items[::2]]
                _expect(dict, self._stack[-1]).update(zip(keys, items[1::2], strict=True))
            case "ADDITEMS":
                items = self._pop_mark()
                _expect(set, self._stack[-1]).update([_expect(str, item) for item in items])
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self._memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[arg])
            case _:
                self._step_inert(name, arg)

    def _step_inert(self, name: str, arg: object) -> None:
        """The opcodes that import, call and set state in a real unpickler."""
        stack = self._stack
        match name:
            case "GLOBAL":
                stack.append(self._global(_expect(str, arg).replace(" ", ".")))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self._global(f"{_expect(str, module)}.{_expect(str, attribute)}"))
            case "REDUCE" | "NEWOBJ":
                args, called = stack.pop(), stack.pop()
                stack.append(self._record(_expect(_Global, called).name, _expect(tuple, args)))
            case "BUILD":
                state, target = _expect(dict, stack.pop()), stack[-1]
                if isinstance(target, _Module):
                    target.state = state
                else:  # attributes on a dict carry no weights: dropped
                    _expect(dict, target)
            case "BINPERSID":
                stack.append(_PersistentId(stack.pop()))
            case _:
                raise ValueError(f"it uses the pickle opcode {name}, which no EDM checkpoint needs")

    def _pop_mark(self) -> list[object]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _global(self, name: str) -> _Global:
        if name not in self._allowed:
            raise ValueError(f"it asks for the global {name[:_MAX_NAME]!r}, which no EDM network needs")
        return _Global(name)

    def _record(self, name: str, args: tuple[object, ...]) -> object:
        """What the call of an allowed global would have built, as data."""
        if name in _DICTS and not args:
            return {}
        if name in _CONTAINERS and not args:
            return _Module(name.rpartition(".")[2], {})
        match name, args:
            case "builtins.set", (list() as items,):
                self._budget.spend(len(items))
                return {_expect(str, item) for item in items}
            case "torch_utils.persistence._reconstruct_persistent_obj", (dict() as meta,):
                return _Module(_expect(str, meta.get("class_name")), _expect(dict, meta.get("state")))
            case "torch.storage._load_from_bytes", (bytes() as archive,):
                return _read_storage(archive, self._budget)
            case "torch._utils._rebuild_tensor_v2", (_Storage() as storage, offset, size, stride, _, _, *_):
                return _checked_tensor(storage, offset, size, stride)
            case "torch._utils._rebuild_parameter", (_Tensor() as tensor, _, _):
                return tensor
        raise ValueError(f"it calls {name} with unexpected arguments")


def _expect(kind: type[_T], value: object) -> _T:
    if not isinstance(value, kind):
        raise ValueError(f"it has a {_name(type(value))} where a {_name(kind)} belongs")
    return value


def _name(kind: type) -> str:
    return kind.__name__.strip("_").lower()


def _read_storage(archive: bytes, budget: _Budget) -> _Storage:
    """One tensor storage: five small pickles, the fourth of which names type and size; a count; the elements.

    Every torch version pickles storages this way, in torch.save's format from before zip archives. torch.load
    is not used on it: it allocates what the pickle claims, and leaves it uninitialised if no elements follow.
    """
    # The pickles take 300 bytes. Cut short, for a file may ask for the same archive to be read over and over.
    stream = io.BytesIO(archive[:_MAX_STORAGE_HEADER])
    allowed = frozenset(_STORAGE_DTYPES)
    magic, version, system, reference, _ = (_InertMachine(allowed, budget).run(stream) for _ in range(5))
    start = stream.tell() + 8
    count, elements = archive[start - 8 : start], memoryview(archive)[start:]
    match system, reference:
        case {"little_endian": True}, _PersistentId(value=("storage", _Global(name=name), _, _, int(numel), None)):
            dtype = _STORAGE_DTYPES[name]
            complete = len(elements) == numel * dtype.itemsize and count == struct.pack("<q", numel)
            if (magic, version) == _STORAGE_VERSION and complete:
                return _Storage(dtype, elements)
    raise ValueError("it has a damaged tensor storage")


def _checked_tensor(storage: _Storage, offset: object, size: object, stride: object) -> _Tensor:
    dims, steps = _expect(tuple, size), _expect(tuple, stride)
    plausible = len(dims) == len(steps) <= _MAX_DIMS and all(
        type(n) is int and 0 <= n < 2**40 for n in (offset, *dims, *steps)
    )
    if not plausible:
        raise ValueError("it has a tensor with an impossible shape")
    tensor = _Tensor(storage, _expect(int, offset), dims, steps)
    # No more elements than the storage has: overlapping strides could ask for a copy of any size.
    if tensor.offset + tensor.span > storage.numel or math.prod(dims) > storage.numel:
        raise ValueError("it has a tensor that reaches outside its storage")
    return tensor


def _read_network(content: object, budget: _Budget, max_bytes: int) -> EDMPickle:
    network = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(network, _Module):
        found = ", ".join(content)[:_MAX_NAME] if isinstance(content, dict) else f"a {_name(type(content))}"
        raise ValueError(f"it has no 'ema' network (found: {found or 'nothing'})")
    if "_init_kwargs" not in network.state:
        raise ValueError("its 'ema' network has no _init_kwargs: it was not saved as a persistent EDM module")
    weights = _Weights(budget, max_bytes)
    weights.collect(network, prefix="", depth=0)
    if not weights.state_dict:
        raise ValueError("its 'ema' network has no weights")
    return EDMPickle(
        state_dict=weights.state_dict,
        init_kwargs=plain_value(_expect(dict, network.state["_init_kwargs"])),
        init_args=plain_value(_expect(tuple, network.state.get("_init_args", ()))),
        class_name=network.class_name,
    )


class _Weights:
    """Collects the tensors of nested module records under the names torch gives them."""

    def __init__(self, budget: _Budget, max_bytes: int) -> None:
        self.state_dict: dict[str, Tensor] = {}
        self._budget = budget
        self._bytes_left = max_bytes
        self._built: dict[_Tensor, Tensor] = {}

    def collect(self, module: _Module, prefix: str, depth: int) -> None:
        if depth > _MAX_DEPTH or len(prefix) > _MAX_NAME:
            raise ValueError(f"its modules are nested more than {_MAX_DEPTH} deep, or have endless names")
        temporary = _expect(set, module.state.get("_non_persistent_buffers_set", set()))
        for name, value in self._entries(module, "_parameters"):
            self._add(prefix + name, _expect(_Tensor, value))
        for name, value in self._entries(module, "_buffers"):
            if name not in temporary:
                self._add(prefix + name, _expect(_Tensor, value))
        for name, child in self._entries(module, "_modules"):
            self.collect(_expect(_Module, child), f"{prefix}{name}.", depth + 1)

    def _entries(self, module: _Module, group: str) -> list[tuple[str, object]]:
        entries = _expect(dict, module.state.get(group, {}))
        self._budget.spend(1 + len(entries))
        return [(name, value) for name, value in entries.items() if value is not None]

    def _add(self, name: str, record: _Tensor) -> None:
        if name in self.state_dict or len(name) > _MAX_NAME:
            raise ValueError(f"it has two tensors called {name[:_MAX_NAME]!r}, or that name is too long")
        if record not in self._built:
            # pickle.dump writes one storage per tensor, so an honest file never gives more bytes than it has.
            self._bytes_left -= record.span * record.storage.dtype.itemsize
            if self._bytes_left < 0:
                raise ValueError("its tensors are larger than the file")
            self._built[record] = _build_tensor(record)
        self.state_dict[name] = self._built[record]


def _build_tensor(record: _Tensor) -> Tensor:
    dtype = record.storage.dtype
    if record.span == 0:
        return torch.empty(record.size, dtype=dtype)
    start, end = record.offset * dtype.itemsize, (record.offset + record.span) * dtype.itemsize
    flat = torch.frombuffer(bytearray(record.storage.data[start:end]), dtype=dtype)
    return flat.as_strided(record.size, record.stride).clone(memory_format=torch.contiguous_format)


def plain_value(value: object) -> Any:
    """Copy of a constructor argument: None, bool, int, float, str; lists, tuples, str-keyed dicts of them.

    Raises:
        ValueError: it holds anything else, more than 10,000 values, or nests more than 32 deep.
    """
    return _plain(value, _Budget(_MAX_ARGUMENTS), depth=0)


def _plain(value: object, budget: _Budget, depth: int) -> Any:
    budget.spend()
    if depth > _MAX_DEPTH:
        raise ValueError(f"the constructor arguments are nested more than {_MAX_DEPTH} deep")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_plain(item, budget, depth + 1) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {_expect(str, key): _plain(item, budget, depth + 1) for key, item in value.items()}
    raise ValueError(f"the constructor arguments hold a {_name(type(value))}, not a plain value")
