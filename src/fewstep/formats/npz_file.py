"""Arrays of numbers from an .npz, whoever wrote it: sizes are compared with the file before anything is allocated."""

import math
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

_MOST_BYTES = 2**29  # of one array; a covariance of 2048 features has 2^25
_UNREADABLE = (
    OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError,
    SyntaxError, OverflowError, RecursionError, MemoryError, AttributeError, IndexError,
)  # fmt: skip


def read_npz(path: Path, names: Iterable[str], optional: Iterable[str] = ()) -> dict[str, np.ndarray[Any, Any]]:
    """The named arrays of a file, as float64; nothing in it is unpickled.

    Args:
        path: the file.
        names: arrays that must be there.
        optional: arrays that may be there.

    Raises:
        ValueError: no such file, a damaged one, an array is missing or is not of finite numbers; says which.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            there = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if missing := [name for name in names if name not in there]:
                raise ValueError(f"{missing[0]} is missing")
            wanted = [*names, *(name for name in optional if name in there)]
            return {name: _read(archive, there[name], name) for name in wanted}
    except _UNREADABLE as error:
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0][:200]) from None


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> np.ndarray[Any, Any]:
    with archive.open(info) as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} is of an unknown version")
        shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.kind not in "fiu" or len(shape) > 2:
            raise ValueError(f"{name} is not a vector or matrix of numbers")
        if not 0 <= size <= min(info.file_size, _MOST_BYTES):
            raise ValueError(f"{name} claims {size} bytes, and the file has {info.file_size} for it")
        content = file.read(size)
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C").astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} contains infinities or NaN")
    return array
