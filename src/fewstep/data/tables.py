"""Pictures by row before they are decoded: files of a folder, or a column of parquet files and hub sets through `datasets`."""

import glob
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.data.listing import SPLITS, Listing, is_metadata, is_picture, list_pictures_below, same_split, walk_files
from fewstep.data.metadata import whole_number
from fewstep.errors import UserError
from fewstep.formats.remote import data_path
from fewstep.formats.source import Source

if TYPE_CHECKING:
    from fewstep.settings import DataSettings

Report = Callable[[str], None]


class PictureRows(Protocol):
    """Encoded pictures by row."""

    def __len__(self) -> int:
        """How many there are."""

    def encoded(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Each as {"bytes": ...} or {"path": ...}."""

    def name(self, index: int, row: dict[str, Any]) -> str:
        """What messages call one."""


class FolderRows:
    """Pictures in files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def encoded(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [{"path": str(self._paths[index])} for index in indices]

    def name(self, index: int, row: dict[str, Any]) -> str:
        return str(self._paths[index])


class TableRows:
    """Pictures in a column of a `datasets` table; paths in it are from where its file lies.

    Raises:
        UserError: the column holds something else.
    """

    def __init__(self, table: Any, column: str, source: str) -> None:
        import datasets

        self._column, self._source, self._root = column, source, table_root(source)
        try:
            self._table = table.cast_column(column, datasets.Image(decode=False)).select_columns([column])
        except Exception as error:  # as in `open_table`
            raise unreadable(f"column {column!r} of {source}", error) from error

    def __len__(self) -> int:
        return len(self._table)

    def encoded(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        try:
            rows = self._table[list(indices)][self._column]
        except Exception as error:  # as in `open_table`
            raise unreadable(f"column {self._column!r} of {self._source}", error) from error
        return [placed(row, self._root) for row in rows]

    def name(self, index: int, row: dict[str, Any]) -> str:
        return f"{shortened(row.get('path') or f'row {index}')} of {self._source}"


def table_root(source: str) -> Path | None:
    """The folder that paths in a table's rows are from; None for a set of the hub."""
    place = data_path(source)
    return place if place.is_dir() else place.parent if place.exists() else None


def placed(row: Mapping[str, Any] | None, root: Path | None) -> dict[str, Any]:
    """A row's picture, {"bytes": ...} or {"path": ...}, with its path where it lies.

    Raises:
        UserError: a URL is all there is of it.
    """
    picture = dict(row or {})
    path = picture.get("path")
    if picture.get("bytes") is not None or not path:
        return picture
    if "://" in path:
        raise UserError(
            f"picture {shortened(path)} is on another machine; download the pictures, and name their folder"
        )
    return {**picture, "path": str(root / path) if root else path}


def shortened(name: str) -> str:
    """A name for messages: rows may hold anything in place of a path."""
    return name if len(name) <= 200 else f"{name[:100]}..."


def picture_tables(folder: Path, where: str) -> list[Path]:
    """Parquet files below a folder, sorted, but those that are metadata of pictures; none in a folder of pictures.

    Raises:
        UserError: there are both, and only one of them would be read.
    """
    files = list(walk_files(folder))
    tables = sorted(name for name in files if name.lower().endswith(".parquet") and not is_metadata(name))
    pictures = [name for name in files if is_picture(name)]
    if tables and pictures:
        raise UserError(
            f"{where} has pictures ({pictures[0]}, ...) and tables ({tables[0]}, ...), and only one of them can be the set; "
            "name the file or folder that is"
        )
    return [folder / name for name in tables]


def split_files(folder: Path, split: str, where: str) -> list[Path]:
    """The parquet files of one split: all, unless each is named like a split ("train-00000-of-00002.parquet").

    Raises:
        UserError: there is no such split.
    """
    return of_split(picture_tables(folder, where), folder, split, where)


def of_split(files: Sequence[Path], folder: Path, split: str, where: str) -> list[Path]:
    """Those files of a folder that are of one split: all, unless each is named like a split; raises as `split_files`."""
    named = {path: _split_of(path, folder) for path in files}
    if not all(named.values()):
        if split != "train":
            raise UserError(f"{where} is not divided into splits: it has no split {split!r}; name the files themselves")
        return list(files)
    wanted = same_split(split)
    chosen = [path for path, name in named.items() if same_split(name) == wanted]
    if not chosen:
        raise UserError(f"{where} has the splits {', '.join(sorted(set(named.values())))} and no split {split!r}")
    return chosen


def has_split(place: Path, split: str) -> bool:
    """Whether a folder of pictures or tables has a split other than "train"; a file has none."""
    try:
        if picture_tables(place, str(place)):
            return bool(split_files(place, split, str(place)))
        return bool(list_pictures_below(place, split).names)
    except UserError:
        return False


def _split_of(path: Path, folder: Path) -> str:
    """The split that a file's name ("test-00000-of-00002", "test") or its folder says it is of, "" for none."""
    word = path.stem.lower().partition("-")[0]
    if word in SPLITS:
        return word
    parent = path.parent.name.lower() if path.parent != folder else ""
    return parent if parent in SPLITS else ""


def open_table(settings: "DataSettings") -> Any:
    """Parquet files or a hub set as a `datasets` table."""
    if not settings.images:
        raise UserError("data.images is not set: name a folder of pictures, a parquet file or a hub data set")
    path, where = data_path(settings.images), f"data.images={settings.images}"
    import datasets

    be_quiet()
    try:
        if path.is_file() and path.suffix.lower() == ".parquet":
            return load_parquet([path])
        if path.is_dir():
            return load_parquet(split_files(path, settings.split, where))
        refuse_other_files(settings.images, where, "folder or parquet file")
        return datasets.load_dataset(settings.images, split=settings.split)
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds; each becomes one sentence with its own words
        raise unreadable(f"{where} (split {settings.split!r}){on_hub(path)}", error) from error


def refuse_other_files(source: str, where: str, kinds: str) -> None:
    """Raise UserError for what is neither read as a set of pictures nor can be the name of one on the hub."""
    place = Source.parse(source)
    if place.exists:
        raise UserError(
            f"{where} is a file of another kind than a {kinds}; put pictures into a folder, and unpack archives"
        )
    if not place.dataset_id:
        raise UserError(f"{where}: no such {kinds}")


def on_hub(path: Path) -> str:
    """What is said of a set that was looked for on the hub, because nothing of its name is on this machine."""
    return "" if path.exists() else " is no file or folder here, and as a data set of the hub it"


def split_note(folder: Path, split: str, where: str) -> str:
    """Which split of a folder of tables is read, as a part of a sentence; empty where there is nothing to say."""
    return note_of_split(picture_tables(folder, where), folder, split) if folder.is_dir() else ""


def note_of_split(files: Sequence[Path], folder: Path, split: str) -> str:
    """As `split_note`, of these files."""
    names = sorted({_split_of(path, folder) for path in files})
    return f" (split {split} of {', '.join(names)})" if all(names) and len(names) > 1 else ""


def load_parquet(files: Sequence[Path], **options: Any) -> Any:
    """Parquet files as one table; characters that mean something in patterns are names here."""
    import datasets

    names = [glob.escape(str(file)) for file in files]
    try:
        return datasets.load_dataset("parquet", data_files={"train": names}, split="train", **options)
    except Exception:
        _refuse_tables(files)
        raise


def _refuse_tables(files: Sequence[Path]) -> None:
    """Raise UserError where parquet files that could not be read as one table are empty, or have different columns."""
    import pyarrow.parquet

    try:
        found = {file: pyarrow.parquet.read_metadata(file) for file in files}
    except (OSError, ValueError):  # a damaged one, which the library names
        return
    if not any(facts.num_rows for facts in found.values()):
        raise UserError(f"{', '.join(map(str, files[:3]))}: no rows, and so no pictures; write the table again")
    columns = {file: set(facts.schema.to_arrow_schema().names) for file, facts in found.items()}
    for file, names in columns.items():
        if only := sorted(names ^ columns[files[0]]):
            raise UserError(f"{files[0]} and {file} are no one table: column {only[0]!r} is in one of them alone")


def be_quiet() -> None:
    """No bars of `datasets`, and no lines of its log: what goes wrong is raised, and told in a sentence."""
    import logging

    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)


def unreadable(what: str, error: Exception) -> UserError:
    """What a library said of a source, as one sentence; a cache that cannot be written is told apart from the pictures."""
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == 30):
        return UserError(
            f"the cache of data sets cannot be written ({error}); set HF_HOME (or HF_DATASETS_CACHE) to a folder that can"
        )
    first: BaseException = error
    while first.__cause__ is not None:  # "an error occurred", says `datasets` of another one
        first = first.__cause__
    words = ", ".join(line.strip() for line in str(first).splitlines() if line.strip())
    return UserError(f"{what} cannot be read: {type(first).__name__}: {words[:300]}")


def image_column(features: Mapping[str, Any], where: str) -> str:
    """The column of pictures: `image` where there is one, else the only one of pictures, or of their bytes.

    Raises:
        UserError: there is none, or several and none of them is called so.
    """
    import datasets

    if "image" in features:
        if _holds_texts_or_bytes(features["image"]):
            raise UserError(f"{where}: column 'image' has lists, and each row is one picture; write a row for each")
        return "image"
    pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    encoded = [name for name, kind in features.items() if getattr(kind, "dtype", "") in ("binary", "large_binary")]
    found = pictures or encoded
    if len(found) > 1:
        raise UserError(
            f"{where} has several columns of pictures ({', '.join(found)}), and only one can be the set: call it image, or drop "
            "the others"
        )
    if not found:
        raise UserError(f"{where}: no column of pictures among {sorted(features)}")
    return str(found[0])


def _holds_texts_or_bytes(kind: Any) -> bool:
    """Whether a column is of lists of encoded pictures, or of their names; lists of numbers are pixels."""
    inner = kind
    while (deeper := getattr(inner, "feature", None)) is not None:
        inner = deeper
    is_encoded = isinstance(inner, dict) or getattr(inner, "dtype", "") in (
        "string",
        "large_string",
        "binary",
        "large_binary",
    )
    return inner is not kind and is_encoded


def table_labels(table: Any, settings: "DataSettings", num_classes: int) -> tuple[Tensor, list[str] | None]:
    """Labels (N,), int64, and the names of the classes where the table has them; raises UserError where they do not fit."""
    column = settings.label_column
    where = f"data.images={settings.images}"
    if column not in table.features:
        raise UserError(
            f"{where}: the model has {num_classes} classes but there is no column data.column={column!r} "
            f"among {sorted(table.features)}; sort the pictures into one folder a class, or add a metadata.jsonl"
        )
    values = labels_in(table, column, where)
    check_labels(values, where, num_classes)
    names = getattr(table.features[column], "names", None)
    return torch.from_numpy(values), names


def listed_labels(listing: Listing, column: str, where: str) -> np.ndarray:
    """Labels (N,), int64, of the pictures of a listing that have a row in its metadata; raises UserError where one is none."""
    named = [name for name in listing.names if name in listing.metadata]
    return _whole_numbers([listing.metadata[name].get(column) for name in named], column, where, named)


def labels_in(table: Any, column: str, where: str) -> np.ndarray:
    """Labels (N,), int64, of a table's column, which may hold them in lists of one; raises UserError where one is none."""
    values = table[column]
    try:
        array = np.asarray(values)
    except ValueError:  # lists of several lengths
        array = np.empty(0, object)
    if not np.issubdtype(array.dtype, np.integer) or array.ndim != 1:
        unpacked = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in values]
        array = _whole_numbers(unpacked, column, where)
    return array.astype(np.int64)


def _whole_numbers(values: Sequence[Any], column: str, where: str, names: Sequence[str] = ()) -> np.ndarray:
    whole = [whole_number(value) for value in values]
    if None in whole:
        wrong = whole.index(None)
        raise UserError(
            f"{where}: column {column!r} holds {str(values[wrong])[:60]!r} for {names[wrong] if names else f'row {wrong}'}, not integer "
            "class labels; number the classes from 0, or sort the pictures into one folder a class"
        )
    return np.asarray(whole, np.int64)


def check_labels(values: np.ndarray, where: str, num_classes: int) -> None:
    """Raise UserError where labels do not fit the model's classes."""
    if values.min() < 0 or values.max() >= num_classes:
        raise UserError(
            f"{where}: labels run from {values.min()} to {values.max()}, the model has {num_classes} classes "
            f"(0..{num_classes - 1})"
        )
