"""Reads what torch.save wrote before 1.6, as VGG16 and LPIPS are published: bare pickles with the elements behind them.

Five pickles (magic number, version, system, state dict, keys of the storages), then each storage in the order of its
keys: a count, and that many elements. The state dict names types and counts before the elements are at hand, so it is
described twice: once to learn where each storage lies, once to check every tensor against it.
"""

import io
import struct

from fewstep.formats.inert_pickle import Budget, Global, InertMachine, expect
from fewstep.formats.pickled_tensors import STORAGE_DTYPES, PickledStorage, PickledTensor
from fewstep.formats.state_dict_pickle import StateDictMachine, state_dict_records

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_MAX_PICKLES = 64 * 2**20  # of all five together
_COUNT = 8  # bytes before the elements of a storage


def read_legacy_records(data: memoryview) -> dict[str, PickledTensor]:
    """The state dict of the file as records, nothing built yet; raises ValueError for anything else."""
    stream = io.BytesIO(data[:_MAX_PICKLES])
    plain = Budget(1000, "state dict")
    if InertMachine(frozenset(), plain).run(stream) != _MAGIC:
        raise ValueError("it is a bare pickle, but not one that torch.save wrote")
    version, system = (InertMachine(frozenset(), plain).run(stream) for _ in range(2))
    if version != _VERSION:
        raise ValueError(f"it has version {version} of torch.save's old format; {_VERSION} is known")
    if expect(dict, system).get("little_endian") is not True:
        raise ValueError("its numbers are big-endian")
    start = stream.tell()
    sizes = _Sizes()
    StateDictMachine(sizes.storage).run(stream)
    keys = expect(list, InertMachine(frozenset(), Budget(_MAX_PICKLES, "list of storages")).run(stream))
    found = _locate(data, stream.tell(), keys, sizes.known)
    stream.seek(start)
    return state_dict_records(StateDictMachine(lambda reference: found[_described(reference)[0]]).run(stream))


class _Sizes:
    """First reading: remembers type and count of each storage, and lets every tensor through unseen."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[str, int]] = {}

    def storage(self, reference: object) -> PickledStorage:
        key, name, numel = _described(reference)
        if self.known.setdefault(key, (name, numel)) != (name, numel):
            raise ValueError(f"its storage {key!r} has two sizes")
        return _Unseen(STORAGE_DTYPES[name], memoryview(b""))


class _Unseen(PickledStorage):
    """A storage before it is known where it lies; any tensor fits in it."""

    @property
    def numel(self) -> int:
        return 2**62


def _described(reference: object) -> tuple[str, str, int]:
    """(key, type, number of elements) of a persistent id."""
    match reference:
        case ("storage", Global(name=name), str() as key, _, int(numel), None) if name in STORAGE_DTYPES:
            if numel >= 0:
                return key, name, numel
    raise ValueError("it has a damaged reference to a tensor storage")


def _locate(
    data: memoryview, at: int, keys: list[object], known: dict[str, tuple[str, int]]
) -> dict[str, PickledStorage]:
    """The storages of the second reading; every one must lie inside the file, none twice."""
    found: dict[str, PickledStorage] = {}
    for key in keys:
        name, numel = known.get(expect(str, key), ("torch.ByteStorage", -1))
        dtype = STORAGE_DTYPES[name]
        count, elements = data[at : at + _COUNT], data[at + _COUNT : at + _COUNT + max(0, numel) * dtype.itemsize]
        complete = bytes(count) == struct.pack("<q", numel) and len(elements) == numel * dtype.itemsize
        if not complete or key in found:
            raise ValueError("it has a damaged tensor storage")
        found[expect(str, key)] = PickledStorage(dtype, elements)
        at += _COUNT + len(elements)
    if missing := known.keys() - found.keys():
        raise ValueError(f"its tensor storage {min(missing)!r} is missing")
    return found
