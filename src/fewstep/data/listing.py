"""Which files of a folder belong to a data set: our own listing decides, says what it took and what it left out.

Every picture below the folder is taken, in the order of its path. Nothing follows from words in file names. A folder is
divided into splits only where all of its pictures lie in folders named like splits ("train", "test", ...).
"""

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from fewstep.errors import UserError

PICTURES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm"}
)
SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SAME = {"training": "train", "testing": "test", "val": "validation", "valid": "validation", "dev": "validation"}


@dataclass(frozen=True)
class Listing:
    """The pictures of a folder.

    Attributes:
        root: the folder they are listed from; of a divided folder the split's own.
        names: paths below `root`, "/" between parts, sorted.
        left_out: what else lies there, by kind, for people.
        metadata: {name: its row of a metadata file}; empty where there is no such file.
        columns: of the metadata, without file_name.
        note: how the folder was read, where that may surprise; "" otherwise.
    """

    root: Path
    names: list[str]
    left_out: Counter[str]
    metadata: dict[str, dict[str, Any]]
    columns: list[str]
    note: str = ""
    sources: tuple[Path, ...] = field(default=(), repr=False)

    @cached_property
    def paths(self) -> list[Path]:
        """The files, in order."""
        return [self.root / name for name in self.names]

    @property
    def folders(self) -> list[str]:
        """The folder directly below `root` that each picture lies in; "" for one that lies in none."""
        return [name.partition("/")[0] if "/" in name else "" for name in self.names]

    @property
    def class_names(self) -> list[str]:
        """Folders directly below `root`, sorted: the classes, where nothing else labels the pictures."""
        return sorted({name for name in self.folders if name})

    def without(self, names: set[str], why: str) -> "Listing":
        """The listing without some pictures, which are counted as left out."""
        if not names:
            return self
        left_out = self.left_out + Counter({why: len(names)})
        kept = [name for name in self.names if name not in names]
        return Listing(self.root, kept, left_out, self.metadata, self.columns, self.note, self.sources)

    def sentence(self) -> str:
        """What was taken and what was not, e.g. "5,980 pictures in 10 classes; 20 files left out: 20 not pictures (.txt)"."""
        classes = self.class_names
        words = f"{len(self.names):,} picture{'s' * (len(self.names) != 1)}"
        if len(classes) > 1:
            words += f" in {len(classes):,} folders"
        if self.note:
            words += f" ({self.note})"
        count = sum(self.left_out.values())
        if count:
            kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(self.left_out.items()))
            words += f"; {count:,} file{'s' * (count != 1)} left out: {kinds}"
        return words

    def fingerprint(self) -> str:
        """Of names and sizes of the pictures and of the metadata's content; the place of the folder does not count."""
        digest = hashlib.sha256()
        for name, path in zip(self.names, self.paths, strict=True):
            digest.update(f"{name}\0{path.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        for path in self.sources:
            digest.update(path.read_bytes())
        return digest.hexdigest()[:32]


def list_pictures_below(folder: Path, split: str = "train", where: str = "") -> Listing:
    """Every picture of a folder, or of one of its splits.

    Args:
        split: "train" also means all of a folder that is not divided.
        where: what the user called the folder, for messages.

    Raises:
        UserError: no picture, no such split, a metadata file that cannot be read or names a picture that is not there.
    """
    where = where or str(folder)
    files, note = sorted(walk_files(folder)), ""
    pictures = [name for name in files if is_picture(name)]
    if not pictures:
        raise UserError(f"{where}: no picture in this folder ({', '.join(sorted(PICTURES))})")
    root, tops = folder, {name.partition("/")[0] if "/" in name else "" for name in pictures}
    known = {top: _SAME.get(top.lower(), top.lower()) for top in tops if top.lower() in SPLITS}
    wanted = _SAME.get(split.lower(), split.lower())
    if known and len(known) == len(tops):
        found = sorted(top for top, name in known.items() if name == wanted or top == split)
        if not found:
            raise UserError(f"{where} has the splits {', '.join(sorted(tops))} and no split {split!r}")
        root = folder / found[0]
        files = [name.partition("/")[2] for name in files if name.startswith(f"{found[0]}/")]
        note = f"split {found[0]}" + f" of {', '.join(sorted(tops))}" * (len(tops) > 1)
    elif wanted != "train":
        raise UserError(f"{where} is not divided into splits: it has no split {split!r}; name the folder itself")
    elif known:
        others = sorted(top or "loose pictures" for top in tops - known.keys())[:3]
        note = f"{', '.join(sorted(known))} taken as ordinary folders, because {', '.join(others)} lie beside"
    return _read(root, files, note, where)


def has_split(folder: Path, split: str) -> bool:
    """Whether `list_pictures_below` finds pictures for a split other than "train"."""
    try:
        return bool(list_pictures_below(folder, split).names)
    except UserError:
        return False


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its suffix, in any case; hidden files are none."""
    path = PurePosixPath(name)
    return path.suffix.lower() in PICTURES and not path.name.startswith(".")


def _read(root: Path, files: list[str], note: str, where: str) -> Listing:
    pictures = [name for name in files if is_picture(name)]
    sources = [name for name in files if PurePosixPath(name).name.lower() in METADATA]
    left_out: Counter[str] = Counter()
    suffixes: Counter[str] = Counter()
    hidden = 0
    for name in files:
        path = PurePosixPath(name)
        if is_picture(name) or path.name.lower() in METADATA:
            continue
        if path.name.startswith(".") or path.name in ("Thumbs.db", "desktop.ini"):
            hidden += 1
        else:
            suffixes[path.suffix.lower() or "no suffix"] += 1
    if suffixes:
        ranked = sorted(suffixes, key=lambda suffix: (-suffixes[suffix], suffix))
        common = ", ".join(ranked[:4]) + ", ..." * (len(ranked) > 4)
        left_out[f"not pictures ({common})"] = sum(suffixes.values())
    if hidden:
        left_out["hidden"] = hidden
    present = set(pictures)
    metadata: dict[str, dict[str, Any]] = {}
    columns: dict[str, None] = {}
    for source in sources:
        for place, row in _rows(root / source):
            name = row.pop("file_name", None)
            if not isinstance(name, str) or not name:
                raise UserError(f"{root / source}: {place} has no file_name; give each row the path of its picture")
            name = str(PurePosixPath(source).parent / PurePosixPath(name.replace("\\", "/")))
            name = os.path.normpath(name).replace(os.sep, "/")
            if name not in present:
                raise UserError(f"{root / source}: {place} names {name}, which is not there; remove the row or add it")
            if name in metadata and metadata[name] != row:
                raise UserError(f"{root / source}: {place} names {name} a second time; keep one row")
            metadata[name] = row
            columns |= dict.fromkeys(row)
    paths = tuple(root / source for source in sources)
    return Listing(root, pictures, left_out, metadata, list(columns), note, paths)


def walk_files(folder: Path) -> Iterator[str]:
    """Files below a folder, as paths with "/"; links are followed, each folder once; hidden folders are not entered."""
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        facts = os.stat(place)
        if (facts.st_dev, facts.st_ino) in seen:
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        below = os.path.relpath(place, folder).replace(os.sep, "/")
        yield from (name if below == "." else f"{below}/{name}" for name in files)


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
            reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
            for row in reader:
                yield f"line {reader.line_num}", {name: value for name, value in row.items() if name is not None}
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}: line {number} is not a JSON object with file_name in it")
                yield f"line {number}", row
    except UserError:
        raise
    except (OSError, ValueError, RecursionError, csv.Error, ImportError) as error:  # pyarrow's own are ValueErrors
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}); mend or remove it") from None
