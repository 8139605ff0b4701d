"""LMDB data sets in the published layout, as tests need them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import lmdb
import numpy as np
from torch import Tensor

from fewstep.formats.atomic import written_aside


def write_lmdb(path: Path, arrays: Mapping[str, Tensor | Sequence[str]]) -> None:
    """Write arrays in the published layout, whole or not at all.

    Args:
        path: folder to write, replaced if there.
        arrays: {name: (N, ...) tensor, or N texts}.

    Raises:
        UserError: no lmdb package, or writing failed.
    """
    rows = {name: [_row_bytes(row) for row in array] for name, array in arrays.items()}
    pages = sum(2 + len(row) // 2048 for values in rows.values() for row in values)
    with written_aside(path) as aside:
        try:
            with (
                lmdb.open(str(aside), map_size=2**24 + pages * 2**13, lock=False) as env,
                env.begin(write=True) as transaction,
            ):
                for name, values in rows.items():
                    array = arrays[name]
                    shape = tuple(array.shape) if isinstance(array, Tensor) else (len(array),)
                    transaction.put(f"{name}_shape".encode(), " ".join(map(str, shape)).encode())
                    for number, value in enumerate(values):
                        transaction.put(f"{name}_{number}_data".encode(), value)
        except lmdb.Error as error:
            raise OSError(str(error)) from error


def _row_bytes(row: Tensor | str) -> bytes:
    if isinstance(row, str):
        return row.encode("utf-8")
    return np.ascontiguousarray(row.detach().cpu().numpy()).tobytes()
