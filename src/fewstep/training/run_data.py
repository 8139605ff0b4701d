"""What a run reads, known by its content: a continued run goes on with the same data wherever it lies now, and notices other data."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.data.listing import is_metadata, is_picture, walk_files
from fewstep.data.shard_folder import is_shard_folder
from fewstep.errors import UserError
from fewstep.formats.atomic import replaced_file
from fewstep.formats.bundled import resolve_path
from fewstep.formats.fingerprints import add_content
from fewstep.formats.lora_list import loras_fingerprint
from fewstep.formats.remote import data_path
from fewstep.formats.source import Source

FILE = "data.json"
# settings that name data
SOURCES = ("teacher.path", "teacher.loras", "data.images", "data.prompts", "data.pairs")
_BEFORE = {"data.latents": "data.images"}  # as earlier versions noted them


@dataclass(frozen=True)
class Content:
    """What a setting led to.

    Attributes:
        source: as the user wrote it.
        fingerprint: of names, sizes and (pictures aside) contents; of the text itself where nothing local lies there.
        num_files: behind it, 0 for what is no local path.
    """

    source: str
    fingerprint: str
    num_files: int


def read_content(
    source: str,
    counts: Callable[[str], bool] = lambda name: not _is_beside(name),
    find: Callable[[str], Path] = data_path,
) -> Content:
    """The content of a file or folder; where it lies does not count, hidden files neither.

    Of pictures the name and the size count. Of other files the content does: whole up to 16 MiB, 256 spread blocks above.

    Args:
        counts: whether a file of a folder is read at all, by its name.
        find: where the source lies.

    Raises:
        UserError: a file cannot be read.
    """
    path = find(source)
    if not path.exists():
        return Content(source, hashlib.sha256(source.encode()).hexdigest()[:32], 0)
    files = sorted((name, file) for name, file in _files(path) if not name or counts(name))
    digest = hashlib.sha256()
    try:
        for name, file in files:
            digest.update(f"{name}\0".encode("utf-8", "surrogateescape"))
            if is_picture(name):
                digest.update(f"{file.stat().st_size}\n".encode())
            else:
                with file.open("rb") as opened:
                    add_content(digest, opened, file.stat().st_size)
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error})") from error
    return Content(source, digest.hexdigest()[:32], len(files))


def read_contents(values: dict[str, Any]) -> dict[str, Content]:
    """What each setting that names data leads to, by dotted key, from flat settings."""
    return {key: _content(key, values[key]) for key in SOURCES if values.get(key)}


def _content(key: str, value: str | Sequence[str]) -> Content:
    """Of one source, or of a list of LoRAs with their strengths; of a teacher's run folder the teacher alone counts."""
    if isinstance(value, str) and key == "data.images" and not is_shard_folder(data_path(value)):
        return read_content(value, _is_of_pictures)
    if isinstance(value, str) and key == "teacher.path":
        folder = Source.parse(value).of_role("teacher")
        return replace(
            read_content(value if folder is None or not folder.exists() else str(folder), find=resolve_path),
            source=value,
        )
    if isinstance(value, str):
        return read_content(value)
    return Content(", ".join(value), loras_fingerprint(value)[:32], len(value))


def _is_of_pictures(name: str) -> bool:
    """Whether a file belongs to a set of pictures; notes and lists beside them do not."""
    return is_picture(name) or is_metadata(name) or name.lower().endswith((".parquet", ".mdb"))


def _is_beside(name: str) -> bool:
    """Whether a file is for people or for their desktop."""
    return name.rpartition("/")[2] in ("Thumbs.db", "desktop.ini") or name.lower().endswith((".md", ".html"))


def same_data(
    folder: Path, now: dict[str, Content], values: dict[str, Any], before: dict[str, Any], *, data_changed: bool = False
) -> set[str]:
    """Compare what a continued run reads with what it read before.

    Args:
        folder: of the run.
        now: from `read_contents`.
        values, before: its settings, flat, now and when it began.
        data_changed: take other data than before.

    Returns:
        Keys whose text may differ from before because what they lead to is the same, or may differ.

    Raises:
        UserError: other data than before; names the setting and how many files there were.
    """
    known, same = _read(folder / FILE), set[str]()
    for key, content in now.items():
        earlier = known.get(key)
        if earlier is None and before.get(key) != values[key]:
            continue  # of a version without this file: the texts are compared
        if earlier is not None and earlier.fingerprint != content.fingerprint and not data_changed:
            raise UserError(_changed(key, earlier, content))
        same.add(key)
    return same


def has_changed(folder: Path, now: dict[str, Content], key: str) -> bool:
    """Whether a setting leads to other data than a run noted when it began; what it did not note is unchanged."""
    before = _read(folder / FILE).get(key)
    return before is not None and key in now and before.fingerprint != now[key].fingerprint


def note_data(folder: Path, contents: dict[str, Content]) -> None:
    """Write down what a run reads, for its continuation."""
    with replaced_file(folder / FILE) as aside:
        text = json.dumps({key: asdict(content) for key, content in contents.items()}, indent=1)
        aside.write_text(text, encoding="utf-8")


def _changed(key: str, earlier: Content, content: Content) -> str:
    what = f"{key}={content.source}"
    if not content.num_files:
        return f"{what} is not there, and this run began with {earlier.source}; put it back"
    return (
        f"{what} holds other files than this run began with ({earlier.num_files:,} then, {content.num_files:,} now; added, "
        "removed or changed since): put them back, repeat with --data-changed to go on with these, or choose another run.folder"
    )


def _read(path: Path) -> dict[str, Content]:
    if not path.is_file():
        return {}
    try:
        noted = {
            _BEFORE.get(key, key): Content(**value)
            for key, value in json.loads(path.read_text(encoding="utf-8")).items()
        }
        for key, content in noted.items():
            if not re.fullmatch("[0-9a-f]{32}", content.fingerprint) or type(content.num_files) is not int:
                raise ValueError(f"{key} has no fingerprint")
        return noted
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, or choose another run.folder") from None


def _files(path: Path) -> list[tuple[str, Path]]:
    """(name below the path, file) of everything in it but hidden files; a file alone has no name, so that it may move."""
    if path.is_file():
        return [("", path)]
    names = (name for name in walk_files(path) if not name.rpartition("/")[2].startswith("."))
    return [(name, path / name) for name in names]
