"""Reads EDM checkpoint pickles as inert data, because the ordinary way of loading runs code from the file."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.formats.inert_pickle import Budget, InertMachine, expect, read_inert, type_name
from fewstep.formats.pickled_tensors import PickledStorage, PickledTensor, build_tensor, checked_tensor, read_storage

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

# The largest released network takes a tenth of the steps; a file that asks for more is built to keep us busy.
_MAX_STEPS = 2_000_000
_MAX_ARGUMENTS = 10_000
_MAX_DEPTH = 32
_MAX_NAME = 256


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

    def read(stream: mmap.mmap) -> EDMPickle:
        budget = Budget(_MAX_STEPS, "EDM network")
        content = _EDMMachine(_DICTS | _CONTAINERS | _CALLS, budget).run(stream)
        return _read_network(content, budget, max_bytes=len(stream))

    return read_inert(Path(path), "EDM checkpoint", 3, read, "Download it again, or give another file")


@dataclass(eq=False, repr=False, slots=True)
class _Module:
    class_name: str
    state: dict[str, object]


class _EDMMachine(InertMachine):
    """The machine with the few calls that an EDM network consists of."""

    def record(self, name: str, args: tuple[object, ...]) -> object:
        if name in _DICTS and not args:
            return {}
        if name in _CONTAINERS and not args:
            return _Module(name.rpartition(".")[2], {})
        match name, args:
            case "builtins.set", (list() as items,):
                self.budget.spend(len(items))
                return {expect(str, item) for item in items}
            case "torch_utils.persistence._reconstruct_persistent_obj", (dict() as meta,):
                return _Module(expect(str, meta.get("class_name")), expect(dict, meta.get("state")))
            case "torch.storage._load_from_bytes", (bytes() as archive,):
                return read_storage(archive, self.budget)
            case "torch._utils._rebuild_tensor_v2", (PickledStorage() as storage, offset, size, stride, _, _, *_):
                return checked_tensor(storage, offset, size, stride)
            case "torch._utils._rebuild_parameter", (PickledTensor() as tensor, _, _):
                return tensor
        return super().record(name, args)

    def set_state(self, target: object, state: object) -> None:
        if isinstance(target, _Module):
            target.state = expect(dict, state)
        else:
            super().set_state(target, state)


def _read_network(content: object, budget: Budget, max_bytes: int) -> EDMPickle:
    network = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(network, _Module):
        found = ", ".join(content)[:_MAX_NAME] if isinstance(content, dict) else f"a {type_name(type(content))}"
        raise ValueError(f"it has no 'ema' network (found: {found or 'nothing'})")
    if "_init_kwargs" not in network.state:
        raise ValueError("its 'ema' network has no _init_kwargs: it was not saved as a persistent EDM module")
    weights = _Weights(budget, max_bytes)
    weights.collect(network, prefix="", depth=0)
    if not weights.state_dict:
        raise ValueError("its 'ema' network has no weights")
    return EDMPickle(
        state_dict=weights.state_dict,
        init_kwargs=plain_value(expect(dict, network.state["_init_kwargs"])),
        init_args=plain_value(expect(tuple, network.state.get("_init_args", ()))),
        class_name=network.class_name,
    )


class _Weights:
    """Collects the tensors of nested module records under the names torch gives them."""

    def __init__(self, budget: Budget, max_bytes: int) -> None:
        self.state_dict: dict[str, Tensor] = {}
        self._budget = budget
        self._bytes_left = max_bytes
        self._built: dict[PickledTensor, Tensor] = {}

    def collect(self, module: _Module, prefix: str, depth: int) -> None:
        if depth > _MAX_DEPTH or len(prefix) > _MAX_NAME:
            raise ValueError(f"its modules are nested more than {_MAX_DEPTH} deep, or have endless names")
        temporary = expect(set, module.state.get("_non_persistent_buffers_set", set()))
        for name, value in self._entries(module, "_parameters"):
            self._add(prefix + name, expect(PickledTensor, value))
        for name, value in self._entries(module, "_buffers"):
            if name not in temporary:
                self._add(prefix + name, expect(PickledTensor, value))
        for name, child in self._entries(module, "_modules"):
            self.collect(expect(_Module, child), f"{prefix}{name}.", depth + 1)

    def _entries(self, module: _Module, group: str) -> list[tuple[str, object]]:
        entries = expect(dict, module.state.get(group, {}))
        self._budget.spend(1 + len(entries))
        return [(name, value) for name, value in entries.items() if value is not None]

    def _add(self, name: str, record: PickledTensor) -> None:
        if name in self.state_dict or len(name) > _MAX_NAME:
            raise ValueError(f"it has two tensors called {name[:_MAX_NAME]!r}, or that name is too long")
        if record not in self._built:
            # pickle.dump writes one storage per tensor, so an honest file never gives more bytes than it has.
            self._bytes_left -= record.span * record.storage.dtype.itemsize
            if self._bytes_left < 0:
                raise ValueError("its tensors are larger than the file")
            self._built[record] = build_tensor(record)
        self.state_dict[name] = self._built[record]


def plain_value(value: object) -> Any:
    """Copy of a constructor argument: None, bool, int, float, str; lists, tuples, str-keyed dicts of them.

    Raises:
        ValueError: it holds anything else, more than 10,000 values, or nests more than 32 deep.
    """
    return _plain(value, Budget(_MAX_ARGUMENTS, "EDM network"), depth=0)


def _plain(value: object, budget: Budget, depth: int) -> Any:
    budget.spend()
    if depth > _MAX_DEPTH:
        raise ValueError(f"the constructor arguments are nested more than {_MAX_DEPTH} deep")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_plain(item, budget, depth + 1) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {expect(str, key): _plain(item, budget, depth + 1) for key, item in value.items()}
    raise ValueError(f"the constructor arguments hold a {type_name(type(value))}, not a plain value")
