"""Tensors in pickles as records, built only after they are checked against the bytes there are."""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.formats.inert_pickle import Budget, Global, InertMachine, PersistentId, expect

STORAGE_DTYPES = {
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
_MAX_DIMS = 8
_MAX_STORAGE_HEADER = 4096


@dataclass(eq=False, repr=False, slots=True)
class PickledStorage:
    """The elements of one storage, still in the file."""

    dtype: torch.dtype
    data: memoryview

    @property
    def numel(self) -> int:
        """Number of elements."""
        return len(self.data) // self.dtype.itemsize


@dataclass(eq=False, repr=False, slots=True)
class PickledTensor:
    """A view of a storage, as it is described in the file."""

    storage: PickledStorage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements of the storage from the tensor's first to its last, both included."""
        if 0 in self.size:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))


def read_storage(archive: bytes, budget: Budget) -> PickledStorage:
    """One tensor storage: five small pickles, the fourth of which names type and size; a count; the elements.

    Every torch version pickles storages this way, in torch.save's format from before zip archives. torch.load
    is not used on it: it allocates what the pickle claims, and leaves it uninitialised if no elements follow.
    """
    # The pickles take 300 bytes. Cut short, for a file may ask for the same archive to be read over and over.
    stream = io.BytesIO(archive[:_MAX_STORAGE_HEADER])
    allowed = frozenset(STORAGE_DTYPES)
    magic, version, system, reference, _ = (InertMachine(allowed, budget).run(stream) for _ in range(5))
    start = stream.tell() + 8
    count, elements = archive[start - 8 : start], memoryview(archive)[start:]
    match system, reference:
        case {"little_endian": True}, PersistentId(value=("storage", Global(name=name), _, _, int(numel), None)):
            dtype = STORAGE_DTYPES[name]
            complete = len(elements) == numel * dtype.itemsize and count == struct.pack("<q", numel)
            if (magic, version) == _STORAGE_VERSION and complete:
                return PickledStorage(dtype, elements)
    raise ValueError("it has a damaged tensor storage")


def checked_tensor(storage: PickledStorage, offset: object, size: object, stride: object) -> PickledTensor:
    """The record of a tensor; raises ValueError when its shape is impossible or leaves its storage."""
    dims, steps = expect(tuple, size), expect(tuple, stride)
    plausible = len(dims) == len(steps) <= _MAX_DIMS and all(
        type(n) is int and 0 <= n < 2**40 for n in (offset, *dims, *steps)
    )
    if not plausible:
        raise ValueError("it has a tensor with an impossible shape")
    tensor = PickledTensor(storage, expect(int, offset), dims, steps)
    # No more elements than the storage has: overlapping strides could ask for a copy of any size.
    if tensor.offset + tensor.span > storage.numel or math.prod(dims) > storage.numel:
        raise ValueError("it has a tensor that reaches outside its storage")
    return tensor


def build_tensor(record: PickledTensor) -> Tensor:
    """A copy of the elements in the file, as a tensor of its own."""
    dtype = record.storage.dtype
    if record.span == 0:
        return torch.empty(record.size, dtype=dtype)
    start, end = record.offset * dtype.itemsize, (record.offset + record.span) * dtype.itemsize
    flat = torch.frombuffer(bytearray(record.storage.data[start:end]), dtype=dtype)
    return flat.as_strided(record.size, record.stride).clone(memory_format=torch.contiguous_format)
