"""Rows of a CSV file by the names in its first line; a comma that cuts a value in two is noticed."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from fewstep.errors import UserError


def csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(place in the file, row) of the text of a CSV file.

    Raises:
        UserError: no CSV, a name twice in the first line, a row of more or fewer values than names.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=_is_spaced(text))
    try:
        names = next(reader, [])
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"{path}: its first line names column {twice[0]!r} more than once; keep one of them")
        for row in reader:
            if row and len(row) != len(names):
                raise UserError(
                    f"{path}: line {reader.line_num} has {len(row)} values, the first line names {len(names)} columns; "
                    'put text that has a comma in it into quotes ("a cat, sitting")'
                )
            if row:
                yield f"line {reader.line_num}", dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} is no CSV ({error}); mend the file") from None


def csv_columns(text: str) -> list[str]:
    """The names in the first line; empty where there is none that can be read."""
    try:
        return next(csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=_is_spaced(text)), [])
    except csv.Error:
        return []


def _is_spaced(text: str) -> bool:
    """Whether every comma of the first line has a space behind it, which belongs to no name then, and to no value."""
    first = text.partition("\n")[0]
    return "," in first and all(name.startswith(" ") for name in first.split(",")[1:])
