"""Prompt lists from text files, tables, published pickles and folders of captioned pictures."""

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fewstep.data.csv_rows import csv_columns, csv_rows
from fewstep.data.listing import walk_files
from fewstep.data.metadata import METADATA
from fewstep.errors import UserError, first_line
from fewstep.formats.inert_pickle import read_pickled_strings
from fewstep.formats.remote import data_path
from fewstep.progress import tell

_SUFFIXES = (".txt", ".parquet", ".pkl", ".jsonl", ".csv")
_LISTS = (".txt", ".pkl")


def load_prompts(path: str | Path, column: str = "text") -> list[str]:
    """All prompts of a file or folder, in order, repeated ones included.

    Args:
        path: .txt (UTF-8, one prompt a line), .parquet, .jsonl or .csv (their column), .pkl (a pickled list[str], read
            without executing anything); or a folder of pictures with metadata.jsonl, .csv or .parquet, or of parquet
            files, of whose splits "train" is read; or one that ships, as "bundled:emoji/prompts_train.txt".
        column: of the tables.

    Blank lines of a list (.txt, .pkl) are skipped; a row of a table without its text counts as the empty prompt, as a picture
    without caption does. How many there are is said in a line.

    Raises:
        UserError: nothing there, no prompts, bytes that are not UTF-8, no such column. The message names the file and the
            line or row.
    """
    path = data_path(path)
    files = _tables(path) if path.is_dir() else [path]
    prompts = [prompt for file in files for prompt in _read(file, column)]
    if not any(prompts):
        raise UserError(f"{path} holds no prompts; give a file with at least one")
    return prompts


def check_column(names: Sequence[str], column: str, where: object, setting: str) -> None:
    """Raise UserError, with the nearest name, when a column is not among these."""
    if column not in names:
        near = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        there = sorted(name[:60] for name in names)
        shown = f"{there[:20]}" + (f" and {len(there) - 20} more" if len(there) > 20 else "")
        raise UserError(f"{where} has no column {setting}={column!r} among {shown}{guess}")


def _tables(folder: Path) -> list[Path]:
    for place in (folder, folder / "train"):
        for name in METADATA:
            if (place / name).is_file():
                return [place / name]
    if files := sorted(folder / name for name in walk_files(folder) if name.lower().endswith(".parquet")):
        from fewstep.data.tables import of_split

        return of_split(files, folder, "train", str(folder))
    raise UserError(f"{folder} holds no prompts: neither {', '.join(METADATA)} nor parquet files; name the file itself")


def _read(path: Path, column: str) -> list[str]:
    readers = {".txt": _from_text, ".jsonl": _from_jsonl, ".csv": _from_csv, ".parquet": _from_parquet}
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    suffix = path.suffix.lower()
    if suffix == ".pkl":
        rows: Iterator[tuple[str, Any]] = ((f"item {n}", s) for n, s in enumerate(read_pickled_strings(path)))
    elif suffix in readers:
        rows = readers[suffix](path, column)
    else:
        raise UserError(f"{path}: prompts are read from {', '.join(_SUFFIXES)} files and folders, not {path.suffix!r}")
    found = [_checked(prompt, path, place) for place, prompt in rows]
    blank = found.count("")
    if suffix in _LISTS:
        if 0 < blank < len(found):
            tell(f"{path}: {blank:,} blank {'lines' if suffix == '.txt' else 'items'} skipped")
        return [prompt for prompt in found if prompt]
    if 0 < blank < len(found):
        tell(f"{path}: {blank:,} rows without a prompt count as the empty prompt")
    return found


def _checked(prompt: Any, path: Path, place: str) -> str:
    """The prompt, "" for none."""
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        return ""
    if not isinstance(prompt, str):
        raise UserError(f"{path}: {place} is {str(prompt)[:60]!r}, not text; name a column of texts")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{path}: {place} holds half a character ({prompt[:60]!r}); mend or remove it") from None
    return prompt


def _lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file without their ends; only line feeds end a line, or carriage returns in a file that has none."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line} is not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    lines = [line.removesuffix("\r") for line in text.split("\n" if "\n" in text else "\r")]
    return lines[:-1] if lines[-1] == "" else lines


def _from_text(path: Path, _: str) -> Iterator[tuple[str, Any]]:
    return ((f"line {number}", line) for number, line in enumerate(_lines(path), start=1))


def _from_jsonl(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is no JSON ({error}); mend or remove it") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is no JSON object; each line is one, with {column!r} in it")
        check_column(list(row), column, f"{path}: line {number}", "column")
        yield f"line {number}", row[column]


def _from_csv(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    text = "\n".join(_lines(path))
    check_column(csv_columns(text), column, path, "column")
    for place, row in csv_rows(path, text):
        yield place, row[column]


def _from_parquet(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            check_column(file.schema_arrow.names, column, path, "column")
            row = 0
            for batch in file.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield f"row {row}", value
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); write or download it again") from None
