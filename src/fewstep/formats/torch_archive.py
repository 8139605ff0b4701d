"""Reads state dicts that torch.save wrote as inert data, because torch.load believes what a file claims.

torch.load(weights_only=True) runs nothing, but a file of a kilobyte makes it allocate any amount of memory (it lets
files call `bytearray`). Here the pickle is only described, and tensors are copied out of the mapped file once their
shapes are checked against the bytes there are; those nobody asked for are never touched.
"""

import io
import mmap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.inert_pickle import Global
from fewstep.formats.legacy_archive import read_legacy_records
from fewstep.formats.pickled_tensors import STORAGE_DTYPES, PickledStorage, PickledTensor, build_tensor
from fewstep.formats.state_dict_pickle import MAX_NAME, StateDictMachine, state_dict_records

_PICKLE = b"\x80"
_MAX_INDEX_BYTES = 8 * 2**20
_MAX_PICKLE_BYTES = 64 * 2**20


def read_torch_archive(path: str | Path, wanted: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """The tensors of a state dict that torch.save wrote, on the CPU, each a copy of its own, in the file's dtypes.

    Args:
        path: the file.
        wanted: which names to build; the others cost nothing. None builds all.

    Raises:
        UserError: missing, cut short, damaged, or holding or calling anything that no
            state dict needs. The message names the file; nothing in it was executed.
    """

    def build(records: dict[str, PickledTensor], size: int) -> dict[str, Tensor]:
        chosen = {name: record for name, record in records.items() if wanted is None or wanted(name)}
        return _build(chosen, max_bytes=size)

    return _read(Path(path), build)


def torch_archive_names(path: str | Path) -> list[str]:
    """Names of the tensors, in the file's order, without reading them; raises as `read_torch_archive`."""
    return _read(Path(path), lambda records, size: list(records))


def _read(path: Path, make: Callable[[dict[str, PickledTensor], int], Any]) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    try:
        with _BoundedReads(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
            _check_start(stream[:4])
            with memoryview(stream) as data:
                if stream[:1] == _PICKLE:
                    return _make_legacy(make, data)
                archive = _Archive(file, data)
                try:
                    return make(archive.read_records(), len(data))
                finally:
                    archive.close()
    except Exception as error:  # a damaged archive fails in many ways
        known = isinstance(error, ValueError | OSError | zipfile.BadZipFile)
        reason = str(error) if known else f"it is damaged ({type(error).__name__}: {error})"
        told = f"{path}: not a readable torch weights file: {reason}; nothing in it was executed"
        raise UserError(f"{told}. Download it again, or give another file") from error


def _check_start(start: bytes) -> None:
    if not start.startswith((b"PK\x03\x04", _PICKLE)):
        raise ValueError("it starts neither like a zip archive, which torch.save writes, nor like a pickle")


def _make_legacy(make: Callable[[dict[str, PickledTensor], int], Any], data: memoryview) -> Any:
    """What `make` makes of a file from before the zip archives, its views of the mapped file let go."""
    try:
        records = read_legacy_records(data)
    except Exception as error:
        raise error.with_traceback(None)  # noqa: B904  # its frames hold views of the file, which could not be closed
    try:
        return make(records, len(data))
    finally:
        for record in records.values():
            record.storage.data.release()


class _BoundedReads(io.FileIO):
    """A file that zipfile cannot be made to read an endless index from."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As a file's own; raises ValueError for more bytes than an index has (zipfile reads the tail unsized)."""
        if size is not None and size > _MAX_INDEX_BYTES:
            raise ValueError("the index of its zip archive is larger than any state dict's")
        return super().read(-1 if size is None else size) or b""


class _Archive:
    """The entries of the zip archive, all stored without compression, as views of the mapped file."""

    def __init__(self, file: io.FileIO, data: memoryview) -> None:
        self._data, self._views = data, list[memoryview]()
        self._storages: dict[tuple[str, str], PickledStorage] = {}
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
        self._entries = {info.filename: info for info in infos}
        if len(self._entries) != len(infos):
            raise ValueError("its zip archive has two entries of one name")
        if any(name.endswith("/constants.pkl") or "/code/__torch__" in name for name in self._entries):
            raise ValueError(
                "it is a TorchScript program, and programs are not run; give the network's state dict (.pth)"
            )
        roots = [name.removesuffix("data.pkl") for name in self._entries if name.endswith("/data.pkl")]
        if len(roots) != 1 or roots[0].count("/") != 1:
            raise ValueError("its zip archive has no single data.pkl at its top, as torch.save writes")
        self._root = roots[0]

    def close(self) -> None:
        """Let go of the mapped file."""
        for view in self._views:
            view.release()

    def read_records(self) -> dict[str, PickledTensor]:
        """The state dict as records, nothing built yet."""
        if f"{self._root}byteorder" in self._entries and bytes(self._entry("byteorder")) != b"little":
            raise ValueError("its numbers are big-endian")
        pickled = self._entry("data.pkl")
        if len(pickled) > _MAX_PICKLE_BYTES:
            raise ValueError("its list of tensors is longer than any state dict's")
        return state_dict_records(StateDictMachine(self.storage).run(io.BytesIO(pickled)))

    def storage(self, reference: object) -> PickledStorage:
        """The elements that a persistent id stands for."""
        match reference:
            case ("storage", Global(name=name), str() as key, _, int(numel)) if name in STORAGE_DTYPES:
                if (name, key) not in self._storages:
                    self._storages[name, key] = PickledStorage(STORAGE_DTYPES[name], self._entry(f"data/{key}"))
                storage = self._storages[name, key]
                if len(storage.data) != numel * storage.dtype.itemsize:
                    raise ValueError(f"its storage {key[:MAX_NAME]} has another size than its tensors say")
                return storage
        raise ValueError("it has a damaged reference to a tensor storage")

    def _entry(self, name: str) -> memoryview:
        info = self._entries.get(self._root + name)
        if info is None:
            raise ValueError(f"its zip archive has no entry {name[:MAX_NAME]!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise ValueError(f"its entry {name[:MAX_NAME]!r} is compressed or encrypted; torch.save stores it plainly")
        header = self._data[info.header_offset : info.header_offset + 30]
        self._views.append(header)
        if len(header) != 30 or bytes(header[:4]) != b"PK\x03\x04":
            raise ValueError(f"its entry {name[:MAX_NAME]!r} is not where the index of its zip archive says")
        start = info.header_offset + 30 + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        view = self._data[start : start + info.file_size]
        self._views.append(view)
        if len(view) != info.file_size:
            raise ValueError(f"its entry {name[:MAX_NAME]!r} is cut short")
        return view


def _build(records: dict[str, PickledTensor], max_bytes: int) -> dict[str, Tensor]:
    """Tensors of records; names that share elements share a tensor, so that names cannot multiply the file."""
    tensors: dict[str, Tensor] = {}
    built: dict[tuple[object, ...], Tensor] = {}
    for name, record in records.items():
        place = (id(record.storage), record.offset, record.size, record.stride)
        if place not in built:
            # Different views of one storage do not overlap in an honest file.
            max_bytes -= record.span * record.storage.dtype.itemsize
            if max_bytes < 0:
                raise ValueError("its tensors are larger than the file")
            built[place] = build_tensor(record)
        tensors[name] = built[place]
    return tensors
