"""The LMDB data sets of published distillation runs: row i of array A under `A_i_data`, its shape under `A_shape`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fewstep.errors import UserError, first_line
from fewstep.formats.fingerprints import add_content
from fewstep.formats.lmdb_pages import check_lmdb_file

Kind = torch.dtype | type[str]
IMAGENET: dict[str, Kind] = {"images": torch.uint8, "labels": torch.int64}
LATENTS: dict[str, Kind] = {"latents": torch.float16, "prompts": str}
ODE_PAIRS: dict[str, Kind] = dict.fromkeys(
    ("latents", "images", "prompt_embeds_list", "pooled_prompt_embeds"), torch.float16
)
_MAX_DIMS, _MAX_NAME = 8, 40
_REMEDY = "the data set is incomplete or damaged: download or make it again"


class LmdbArrays:
    """The arrays of one LMDB, read row by row; nothing is held in memory.

    Args:
        path: the folder with data.mdb, or the file itself.
        kinds: the arrays to read, {name: dtype, or str for UTF-8 text}; IMAGENET, LATENTS and ODE_PAIRS are the
            published ones. On opening, the file's pages are checked and every row of them is looked up.

    Attributes:
        shapes: {name: shape}, rows first.

    Raises:
        UserError: no LMDB there, no lmdb package, a shape key or a row is missing, a row has another length than its
            shape and dtype say. The message names path and key.
    """

    def __init__(self, path: str | Path, kinds: Mapping[str, Kind]) -> None:
        self.path, self._kinds = Path(path), dict(kinds)
        self._shared: _Environment | None = _Environment.of(self.path)
        try:
            self.shapes = {name: read_array_shape(self._env, name) for name in kinds}
            for name in kinds:
                self._check(name)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files, unless another reader has them open."""
        self._shared = None

    def fingerprint(self) -> str:
        """Of the content, wherever it lies: size and 256 spread blocks of the file, or all of a small one.

        Raises:
            UserError: it cannot be read.
        """
        file, digest = self.path / "data.mdb" if self.path.is_dir() else self.path, hashlib.sha256()
        try:
            with file.open("rb") as opened:
                add_content(digest, opened, file.stat().st_size)
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error})") from error
        return digest.hexdigest()[:32]

    @property
    def _env(self) -> Any:
        if self._shared is None:
            raise ValueError(f"{self.path} is closed")
        return self._shared.env

    def __enter__(self) -> LmdbArrays:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rows(self, name: str, indices: Sequence[int] | Tensor) -> Tensor:
        """Rows of an array, (len(indices), *shape[1:]), in its own dtype.

        Raises:
            ValueError: an array of text, or one that was not opened.
            IndexError: no such row.
        """
        dtype = self._kinds.get(name)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name!r} is no opened array of numbers; opened are {self._kinds}")
        shape = (len(indices), *self.shapes[name][1:])
        flat = (
            torch.frombuffer(bytearray(b"".join(self._raw(name, indices))), dtype=dtype) if math.prod(shape) else None
        )
        return torch.empty(shape, dtype=dtype) if flat is None else flat.reshape(shape)

    def texts(self, name: str, indices: Sequence[int] | Tensor) -> list[str]:
        """Rows of an array of text.

        Raises:
            ValueError: an array of numbers, or one that was not opened.
            IndexError: no such row.
            UserError: a row is not UTF-8.
        """
        if self._kinds.get(name) is not str:
            raise ValueError(f"{name!r} is no opened array of text; opened are {self._kinds}")
        texts = []
        for index, raw in zip(_numbers(indices), self._raw(name, indices), strict=True):
            try:
                texts.append(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{self.path}: {_key(name, index)} is not UTF-8 text ({error}); {_REMEDY}") from None
        return texts

    def _raw(self, name: str, indices: Sequence[int] | Tensor) -> list[bytes]:
        numbers = _numbers(indices)
        if any(not 0 <= number < self.shapes[name][0] for number in numbers):
            raise IndexError(f"rows {numbers} of an array of {self.shapes[name][0]}")
        with _reading(self._env) as transaction:
            return [transaction.get(_key(name, number).encode()) for number in numbers]

    def _check(self, name: str) -> None:
        shape, kind = self.shapes[name], self._kinds[name]
        size = math.prod(shape[1:]) * kind.itemsize if isinstance(kind, torch.dtype) else None
        if size is None and len(shape) != 1:
            raise UserError(f"{self.path}: {name}_shape is {shape}, for text it has one number; {_REMEDY}")
        with _reading(self._env, buffers=True) as transaction:
            for number in range(shape[0]):
                row = transaction.get(_key(name, number).encode())
                if row is None:
                    raise UserError(f"{self.path}: {_key(name, number)} is missing of {shape[0]} rows; {_REMEDY}")
                if size is not None and len(row) != size:
                    raise UserError(
                        f"{self.path}: {_key(name, number)} has {len(row)} bytes, a row of shape {shape[1:]} and "
                        f"{str(kind).removeprefix('torch.')} has {size}; {_REMEDY}"
                    )


class _Environment:
    """An open LMDB. The library opens a file once a process, so its readers share it; the last one closes it."""

    open_now: ClassVar[WeakValueDictionary[tuple[int, int], _Environment]] = WeakValueDictionary()

    def __init__(self, env: Any) -> None:
        self.env = env

    def __del__(self) -> None:
        self.env.close()

    @classmethod
    def of(cls, path: Path) -> _Environment:
        """The one of this file that is open, or a new one; raises UserError as `LmdbArrays`."""
        file = path / "data.mdb" if path.is_dir() else path
        key = (file.stat().st_dev, file.stat().st_ino) if file.is_file() else (0, 0)
        found = cls.open_now.get(key)
        if found is None:
            cls.open_now[key] = found = cls(_open(path))
        return found


def read_array_shape(env: Any, name: str) -> tuple[int, ...]:
    """Shape of an array, rows first, from an open lmdb environment.

    Raises:
        UserError: its shape key is missing or no shape; names the arrays that are there.
    """
    key = f"{name}_shape"
    with _reading(env) as transaction:
        raw = transaction.get(key.encode())
    if raw is None:
        there = [name[:_MAX_NAME] if name.isprintable() else repr(name[:_MAX_NAME]) for name in array_names(env)[:9]]
        raise UserError(
            f"{env.path()}: the key {key} is missing (arrays there: {', '.join(there) or 'none'}); "
            "it is another kind of data set, or damaged: give the right one or download it again"
        )
    words = raw.decode("utf-8", errors="replace").split()
    numbers = all(word.isascii() and word.isdigit() and len(word) < 16 for word in words)
    if not 0 < len(words) <= _MAX_DIMS or not numbers:
        raise UserError(f"{env.path()}: {key} is {raw[:80]!r}, not numbers separated by spaces; {_REMEDY}")
    return tuple(int(word) for word in words)


def array_names(env: Any) -> list[str]:
    """Names of the arrays of an open lmdb environment, from its shape keys."""
    names = []
    with _reading(env) as transaction, transaction.cursor() as cursor:
        found = cursor.first()
        while found:  # skip over the rows of each array, of which there may be millions
            key = bytes(cursor.key())
            if key.endswith(b"_shape"):
                names.append(key.removesuffix(b"_shape").decode("utf-8", errors="replace"))
            stem = key.removesuffix(b"_data").rstrip(b"0123456789")
            skips = key.endswith(b"_data") and stem != key.removesuffix(b"_data")
            found = cursor.set_range(stem + b":") if skips else cursor.next()  # ":" follows the digits
            if found and bytes(cursor.key()) <= key:
                raise UserError(f"{env.path()}: its keys are out of order; {_REMEDY}")
    return names


def _key(name: str, number: int) -> str:
    return f"{name}_{number}_data"


def _numbers(indices: Sequence[int] | Tensor) -> list[int]:
    return [int(number) for number in (indices.tolist() if isinstance(indices, Tensor) else indices)]


def _open(path: Path) -> Any:
    lmdb = _import_lmdb()
    if not (path / "data.mdb").is_file() and not path.is_file():
        raise UserError(f"{path} holds no LMDB: give the folder with data.mdb, or the file")
    file = path / "data.mdb" if path.is_dir() else path
    try:  # the library maps the file and trusts it: a garbled page would end the process
        check_lmdb_file(file)
        return lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False, create=False)
    except (lmdb.Error, OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be opened as LMDB ({first_line(error)}); check the path, or download it again"
        ) from error


@contextmanager
def _reading(env: Any, **options: Any) -> Iterator[Any]:
    """A read transaction; what the library finds wrong on its way is told as the file's damage."""
    try:
        with env.begin(**options) as transaction:
            yield transaction
    except _import_lmdb().Error as error:
        raise UserError(f"{env.path()}: {first_line(error)}; {_REMEDY}") from error


def _import_lmdb() -> ModuleType:
    try:
        import lmdb
    except ImportError:
        raise UserError("LMDB data sets need the lmdb package: pip install lmdb") from None
    return lmdb
