"""Metadata files of a folder of pictures: a row with labels or captions for each picture that it names."""

import json
import os
from collections.abc import Iterator
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
    for source in sources:
        for place, row in _rows(folder / source):
            name = row.pop("file_name", None)
            if not isinstance(name, str) or not name:
                raise UserError(
                    f"{folder / source}: {place} has no file_name among {sorted(map(str, row))[:6]}; give each row the path of its "
                    "picture"
                )
            if os.path.isabs(name):
                name = os.path.relpath(name, (folder / source).parent.absolute())
            name = str(PurePosixPath(source).parent / PurePosixPath(name.replace("\\", "/")))
            name = os.path.normpath(name).replace(os.sep, "/")
            if name not in present:
                raise UserError(
                    f"{folder / source}: {place} names {name}, which is no picture below {folder}; remove the row or add it"
                )
            if name in metadata and metadata[name] != row:
                raise UserError(f"{folder / source}: {place} names {name} a second time; keep one row")
            metadata[name] = row
    return metadata


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
