"""Metadata files of a folder of pictures: a row with labels or captions for each picture that it names."""

import json
import os
import re
import unicodedata
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from fewstep.data.csv_rows import csv_rows
from fewstep.errors import UserError, first_line

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def metadata_of(folder: Path, sources: list[str], present: set[str]) -> dict[str, dict[str, Any]]:
    """{picture: its row} of metadata files, which name pictures by their place from where the file lies.

    Args:
        sources: the metadata files, as paths below `folder`.
        present: the pictures there are, likewise.

    Raises:
        UserError: a file cannot be read, a row names no picture, or one that is not there.
    """
    metadata: dict[str, dict[str, Any]] = {}
    names = _Names(folder, present)
    for source in sources:
        for place, row in _rows(folder / source):
            name = row.pop("file_name", None)
            if not isinstance(name, str) or not name:
                raise UserError(
                    f"{folder / source}: {place} has no file_name among {sorted(map(str, row))[:6]}; give each row the path of its "
                    "picture"
                )
            found = names.find(name, source)
            if found is None:
                raise UserError(
                    f"{folder / source}: {place} names {name}, which is no picture below {folder}{names.guess(name)}; remove the row "
                    "or add it"
                )
            name = found
            if name in metadata and metadata[name] != row:
                raise UserError(f"{folder / source}: {place} names {name} a second time; keep one row")
            metadata[name] = row
    return metadata


class _Names:
    """The pictures of a folder by what a metadata file may call them: with separators of Windows, by an absolute path, or with
    letters and accents in one character or in two, as file systems differ.

    Args:
        present: the pictures there are, as paths below `folder`.
    """

    def __init__(self, folder: Path, present: set[str]) -> None:
        self._folder, self._present = folder, present

    def find(self, name: str, source: str) -> str | None:
        """The picture that a row of the metadata file `source` names; None where there is none, or two."""
        prefix = source[: source.rfind("/") + 1]
        if prefix + name in self._present:  # as it stands, and quickly
            return prefix + name
        for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
            for folder in (os.path.abspath(self._folder), os.path.realpath(self._folder)):
                place = os.path.join(folder, prefix, spelling)
                if os.path.isabs(spelling) and folder == os.path.realpath(self._folder):
                    place = os.path.join(os.path.realpath(os.path.dirname(spelling)), os.path.basename(spelling))
                found = os.path.relpath(place, folder).replace(os.sep, "/")
                if found in self._present:
                    return found
                alike = self._alike.get(unicodedata.normalize("NFC", found), [])
                if len(alike) == 1:
                    return alike[0]
        return None

    def guess(self, name: str) -> str:
        """What may be meant by a name that is none, as a part of a sentence."""
        last = PurePosixPath(name.replace("\\", "/")).name.casefold()
        near = sorted(found for found in self._present if PurePosixPath(found).name.casefold() == last)
        return f" (did you mean {near[0]}?)" if near else ""

    @cached_property
    def _alike(self) -> dict[str, list[str]]:
        alike: dict[str, list[str]] = {}
        for name in self._present:
            alike.setdefault(unicodedata.normalize("NFC", name), []).append(name)
        return alike


def whole_number(value: Any) -> int | None:
    """A label as a number: a whole one, or its decimal digits as text, which is all that CSV has; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r" *-?[0-9]{1,10} *", value):
        value = int(value)
    return value if type(value) is int and abs(value) < 2**31 else None


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place in the file, row) of a metadata file."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            import pyarrow.parquet

            with pyarrow.parquet.ParquetFile(path) as file:
                table = file.read()
            yield from ((f"row {number}", dict(row)) for number, row in enumerate(table.to_pylist(), start=1))
            return
        text = path.read_bytes().decode("utf-8-sig")
        if suffix == ".csv":
            yield from csv_rows(path, text)
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}: line {number} is not a JSON object with file_name in it")
                yield f"line {number}", row
    except UserError:
        raise
    except (OSError, ValueError, RecursionError, ImportError) as error:  # pyarrow's own are ValueErrors
        raise UserError(f"{path} cannot be read ({first_line(error)}); mend or remove it") from None
