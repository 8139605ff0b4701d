"""One tensor spread over many safetensors files, mapped into memory: reading a row reads that row."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.formats.json_files import parse_json

_DTYPES = {"F16": np.float16, "F32": np.float32, "I64": np.int64, "U8": np.uint8}


class StoredRows:
    """Rows of arrays (n_k, ...) that follow each other.

    Args:
        padded: the rows of different arrays may differ in length; shorter ones are read with zeros at their end.

    Attributes:
        row_shape: shape of one row.

    Raises:
        ValueError: no arrays, or rows of different shape or dtype.
    """

    def __init__(self, parts: list[np.ndarray], *, padded: bool = False) -> None:
        if len({(part.shape[2 if padded else 1 :], part.dtype) for part in parts}) != 1:
            raise ValueError("the shards hold rows of different shapes")
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.row_shape: tuple[int, ...] = max(part.shape[1:] for part in parts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, index: Tensor) -> Tensor:
        """Rows (B, ...) at these numbers (B,), on the CPU.

        Raises:
            IndexError: no such row.
        """
        numbers = index.cpu().numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"rows {numbers.min()}..{numbers.max()} of {len(self)}")
        part_of = np.searchsorted(self._ends, numbers, side="right")
        result = np.zeros((len(numbers), *self.row_shape), self._parts[0].dtype)
        for number in np.unique(part_of):
            part, chosen = self._parts[number], part_of == number
            own = tuple(slice(side) for side in part.shape[1:])
            result[(chosen, *own)] = part[numbers[chosen] - (self._ends[number] - len(part))]
        return torch.from_numpy(result)


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: {tensor: {dtype, shape, data_offsets}} and the header's own length.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} is no safetensors file")
        return {**parse_json(file.read(length)), "": length}


def map_tensor(path: Path, name: str) -> np.ndarray:
    """One tensor of a safetensors file, mapped read-only.

    Raises:
        OSError, ValueError: the file cannot be read.
        KeyError: it has no such tensor.
    """
    header = read_header(path)
    entry = header[name]
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, mode="r", offset=8 + header[""] + entry["data_offsets"][0], shape=shape)
