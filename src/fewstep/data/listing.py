"""Which files of a folder belong to a data set: our own listing decides, says what it took and what it left out.

Every picture below the folder is taken, in the order of its path. Nothing follows from words in file names. A folder is
divided into splits only where all of its pictures lie in folders named like splits ("train", "test", ...).
"""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from fewstep.data.metadata import METADATA, metadata_of
from fewstep.errors import UserError

PICTURES = frozenset(
    {
        ".png", ".apng", ".jpg", ".jpeg", ".jfif", ".jpe", ".jif", ".pjpeg", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
        ".avif", ".jp2", ".tga", ".ppm", ".pgm", ".pnm",
    }
)  # fmt: skip
_UNREAD = frozenset({".heic", ".heif", ".jxl", ".svg", ".psd", ".exr", ".hdr", ".dng", ".cr2", ".nef", ".arw", ".raw"})
SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval")
_SAME = {"training": "train", "testing": "test", "val": "validation", "valid": "validation", "dev": "validation"}


@dataclass(frozen=True)
class Listing:
    """The pictures of a folder.

    Attributes:
        root: the folder they are listed from; of a divided folder the split's own.
        names: paths below `root`, "/" between parts, sorted.
        others: files that are neither pictures nor metadata, below `root`.
        dropped: pictures that were left out, by the reason, for people.
        metadata: {name: its row of a metadata file}; empty where there is no such file.
        columns: of the metadata, without file_name.
        note: how the folder was read, where that may surprise; "" otherwise.
        bare: folders directly below `root` that have no picture.
        again: folders that are links to one that is listed already, and so are left out.
    """

    root: Path
    names: list[str]
    others: list[str]
    metadata: dict[str, dict[str, Any]]
    columns: list[str]
    dropped: Counter[str] = field(default_factory=Counter)
    note: str = ""
    sources: tuple[Path, ...] = field(default=(), repr=False)
    bare: tuple[str, ...] = ()
    again: tuple[str, ...] = ()

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
        """Folders directly below `root`, sorted: the classes, where nothing else labels the pictures.

        Where all are numbers they are sorted as such: class 2 comes before class 10.
        """
        names = {name for name in self.folders if name}
        numbered = all(name.isascii() and name.isdigit() for name in names)
        return sorted(names, key=lambda name: (int(name) if numbered else 0, name))

    def without(self, names: set[str], why: str) -> "Listing":
        """The listing without some pictures, which are counted as left out."""
        if not names:
            return self
        kept = [name for name in self.names if name not in names]
        return replace(self, names=kept, dropped=self.dropped + Counter({why: len(names)}))

    def beside(self, used: set[str]) -> "Listing":
        """The listing of which some other files are read too, and so are not left out."""
        return replace(self, others=[name for name in self.others if name not in used])

    def sentence(self) -> str:
        """What was taken and what was not, e.g. "5,980 pictures in 10 classes; 20 files left out: 20 not pictures (.txt)"."""
        classes = self.class_names
        words = f"{len(self.names):,} picture{'s' * (len(self.names) != 1)}"
        if len(classes) > 1:
            words += f" in {len(classes):,} folders"
        if self.note:
            words += f" ({self.note})"
        left_out = _left_out(self.others) + self.dropped
        if count := left_out.total():
            kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(left_out.items()))
            words += f"; {count:,} file{'s' * (count != 1)} left out: {kinds}"
        if self.bare and classes:
            words += f"; {_folders(self.bare)} without pictures"
        if self.again:
            words += f"; {_folders(self.again)} left out: the same as one that is listed, by a link"
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
    again: list[str] = []
    files, note = sorted(walk_files(folder, again.append)), ""
    pictures = [name for name in files if is_picture(name)]
    if not pictures:
        raise UserError(f"{where}: {_no_picture(files)}")
    top, tops = "", {name.partition("/")[0] if "/" in name else "" for name in pictures}
    known = {name: same_split(name) for name in tops if name.lower() in SPLITS}
    wanted = same_split(split)
    if known and len(known) == len(tops):
        found = sorted(place for place, name in known.items() if name == wanted or place == split)
        if not found:
            raise UserError(f"{where} has the splits {', '.join(sorted(tops))} and no split {split!r}")
        top = found[0]
        note = f"split {found[0]}" + f" of {', '.join(sorted(tops))}" * (len(tops) > 1)
    elif wanted != "train":
        raise UserError(f"{where} is not divided into splits: it has no split {split!r}; name the folder itself")
    elif known:
        others = sorted(top or "loose pictures" for top in tops - known.keys())[:3]
        note = f"{', '.join(sorted(known))} taken as ordinary folders, because {', '.join(others)} lie beside"
    return _read(folder, files, top, note, again)


def same_split(name: str) -> str:
    """One name for a split that goes by several ("val", "dev")."""
    return _SAME.get(name.lower(), name.lower())


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its suffix, in any case; hidden files are none."""
    path = PurePosixPath(name)
    return path.suffix.lower() in PICTURES and not path.name.startswith(".")


def _read(folder: Path, files: list[str], top: str, note: str, again: list[str]) -> Listing:
    """The listing of a folder, or of its split `top`; a metadata file beside the splits counts for each of them."""
    prefix = f"{top}/" if top else ""
    own = [name for name in files if name.startswith(prefix)]
    pictures = [name for name in own if is_picture(name)]
    sources = [name for name in own if is_metadata(name)]
    beside = [name for name in files if prefix and "/" not in name and is_metadata(name)]
    metadata = metadata_of(folder, [*beside, *sources], {name for name in files if is_picture(name)})
    ours = {name.removeprefix(prefix): row for name, row in metadata.items() if name.startswith(prefix)}
    columns = dict.fromkeys(column for row in ours.values() for column in row)
    names = [name.removeprefix(prefix) for name in pictures]
    others = [name.removeprefix(prefix) for name in own if not (is_picture(name) or is_metadata(name))]
    paths = tuple(folder / source for source in [*beside, *sources])
    linked = tuple(sorted(name.removeprefix(prefix) for name in again if name.startswith(prefix)))
    known = {*(name.partition("/")[0] for name in names if "/" in name), *linked}
    bare = tuple(sorted(name for name in _folders_in(folder / top) if name not in known))
    return Listing(folder / top, names, others, ours, list(columns), note=note, sources=paths, bare=bare, again=linked)


def _folders_in(folder: Path) -> list[str]:
    """Names of the folders directly in a folder that are entered."""
    return [name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name)) and _is_entered(name)]


def _folders(names: tuple[str, ...]) -> str:
    """How many folders, and the first few by name."""
    return f"{len(names):,} folder{'s' * (len(names) != 1)} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"


def _no_picture(files: list[str]) -> str:
    """What there is in a folder without pictures, and what to do about it."""
    if "state.json" in files and any(name.endswith(".arrow") for name in files):
        return "it was written by save_to_disk of datasets, which is not read; write the set as parquet (to_parquet)"
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(_left_out(files).items()))
    found = f", but {kinds}; pictures are" if kinds else " or below it; pictures are"
    return f"no picture in this folder{found} {', '.join(sorted(PICTURES))}"


def is_metadata(name: str) -> bool:
    """Whether a file is about the pictures beside it."""
    return PurePosixPath(name).name.lower() in METADATA


def _left_out(files: list[str]) -> Counter[str]:
    """How many files of which kind there are among those that are neither pictures nor about them."""
    left_out: Counter[str] = Counter()
    suffixes: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    for name in files:
        path = PurePosixPath(name)
        if path.name.startswith(".") or path.name in ("Thumbs.db", "desktop.ini"):
            left_out["hidden"] += 1
        elif path.suffix.lower() in _UNREAD:
            unread[path.suffix.lower()] += 1
        else:
            suffixes[path.suffix.lower() or "no suffix"] += 1
    for kind, counts in (("not pictures", suffixes), ("pictures of kinds that are not read", unread)):
        if counts:
            ranked = sorted(counts, key=lambda suffix: (-counts[suffix], suffix))
            common = ", ".join(ranked[:4]) + ", ..." * (len(ranked) > 4)
            left_out[f"{kind} ({common})"] = counts.total()
    return left_out


def walk_files(folder: Path, on_again: Callable[[str], None] = lambda name: None) -> Iterator[str]:
    """Files below a folder, as paths with "/"; links are followed, each folder once; hidden folders are not entered.

    A pipe, a socket or a device is no file, and reading it may never end.

    Args:
        on_again: called with a folder that is one of those before, by a link; not with one that holds itself.

    Raises:
        UserError: a folder cannot be listed, and its files would be missing without a word.
    """
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_unlisted):
        facts = os.stat(place)
        below = os.path.relpath(place, folder).replace(os.sep, "/")
        if (facts.st_dev, facts.st_ino) in seen:
            folders.clear()
            if not any(os.path.samefile(place, upper) for upper in _above(place, folder)):
                on_again(below)
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders[:] = sorted(name for name in folders if _is_entered(name))
        regular = (name for name in files if _is_regular(os.path.join(place, name)))
        yield from (name if below == "." else f"{below}/{name}" for name in regular)


def _is_entered(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _above(place: str, folder: Path) -> Iterator[str]:
    """The folders that `place` lies in, up to `folder`."""
    while len(place) > len(str(folder)):
        place = os.path.dirname(place)
        yield place


def _refuse_unlisted(error: OSError) -> None:
    raise UserError(f"the folder {error.filename} cannot be listed ({error.strerror}); allow it, or take it away")


def _is_regular(path: str) -> bool:
    """Whether this is a file, or a link to nothing, which whoever reads it will name."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True
