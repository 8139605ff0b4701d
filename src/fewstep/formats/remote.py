"""Files on object storage, read through fsspec: what a URL leads to is copied into the user's cache folder once, whole, and read there.

Training reads rows at random, at each step; that wants a disk. A copy is continued where it was interrupted, and a file whose
size, date or tag is another one than at the last time is copied again.
"""

import hashlib
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from fewstep.errors import UserError, disk_error
from fewstep.formats.atomic import replaced_file
from fewstep.formats.bundled import resolve_path
from fewstep.progress import Stderr, tell, working

EXTRAS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}
_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "updated", "mtime", "created")
_THREADS, _NOTE_EVERY_SECONDS = 8, 5.0
_COPY = "copy.json"


def is_url(source: str | Path) -> bool:
    """Whether a source is on other storage than this machine's: PROTOCOL://..."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", str(source)) is not None


def refuse_url(place: str | Path, option: str) -> None:
    """Raise UserError for a place to write to that is a URL, also one that was made a path of."""
    if is_url(re.sub(":/+", "://", str(place), count=1)):
        raise UserError(f"{option}={place}: prepare writes on a disk; name a folder there and copy it afterwards")


def user_cache(name: str) -> Path:
    """`fewstep/NAME` in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    place = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(place) if Path(place).is_absolute() else Path.home() / ".cache") / "fewstep" / name


def data_path(source: str | Path) -> Path:
    """Where data lie that a user names: a path, "bundled:..." or a URL, whose copy is made first.

    Raises:
        UserError: as `local_copy`; "bundled:" and a name that does not ship.
    """
    return local_copy(str(source)) if is_url(source) else resolve_path(source)


@cache  # a process sees one state of a URL
def local_copy(url: str) -> Path:
    """A file or folder of other storage on this machine's disk, the same to the last file. Processes that ask at once wait for one copy.

    Raises:
        UserError: what reads this kind of URL is not installed; nothing is there, or it may not be read; the disk is full.
    """
    files, root, storage = _listing(url)
    name = root.rpartition("/")[2]
    place = user_cache("remote") / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"[:120]
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / "lock"):
            _bring(url, files, storage, place)
    except OSError as error:
        raise disk_error(error, place) or UserError(f"{url} cannot be copied to {place} ({error})") from error
    return place / "files" / name if files.keys() == {""} else place / "files"


def open_storage(url: str) -> tuple[Any, str]:
    """What reads a URL (a file system of fsspec), and the URL as it names it.

    Raises:
        UserError: nothing does, or it is not installed.
    """
    import fsspec

    try:
        storage, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        protocol = url.partition("://")[0].lower()
        package, extra = EXTRAS.get(protocol, ("", ""))
        install = f"pip install {package} (the extra {extra} of ours)" if package else str(error)
        raise UserError(f"{url}: what reads {protocol}:// is not installed; {install}") from error
    except Exception as error:  # each storage raises its own
        raise UserError(f"{url} cannot be opened ({error})") from error
    return storage, str(root).rstrip("/")


def _listing(url: str) -> tuple[dict[str, dict[str, Any]], str, Any]:
    """{name below the URL: facts} of all files, "" for a file itself; the URL and what reads it."""
    storage, root = open_storage(url)
    try:
        found = storage.find(root, detail=True)
    except Exception as error:  # as above
        raise UserError(f"{url} cannot be listed ({type(error).__name__}: {error})") from error
    files: dict[str, dict[str, Any]] = {}
    for path, facts in found.items():
        name = path.removeprefix(root).strip("/")
        parts = PurePosixPath(name).parts
        if (path != root and not path.startswith(f"{root}/")) or ".." in parts or "\\" in name:
            raise UserError(f"{url}: {path!r} is not a name of a file below it")
        files[name] = facts
    if not files:
        raise UserError(f"{url}: nothing is there")
    return files, root, storage


def _bring(url: str, files: dict[str, dict[str, Any]], storage: Any, place: Path) -> None:
    """Copy what is missing or another one, remove what is there no more."""
    own = {name: place / "files" / (name or PurePosixPath(files[name]["name"]).name) for name in files}
    wanted, noted = {name: _version(facts) for name, facts in files.items()}, _noted(place / _COPY)
    missing = [name for name in files if noted.get(name) != wanted[name] or not own[name].is_file()]
    kept = {name: noted[name] for name in files if name not in missing}
    size = sum(int(files[name].get("size") or 0) for name in missing)
    free = shutil.disk_usage(place).free
    if size > free:
        raise UserError(
            f"{url}: {size / 1e9:,.3g} GB are to be copied to {place} and {free / 1e9:,.3g} GB are free there; let XDG_CACHE_HOME "
            "name a larger disk"
        )
    _remove_others(place / "files", set(own.values()))
    if not missing:
        return
    tell(f"{url}: {len(missing):,} files, {size / 1e6:,.1f} MB, are copied to {place}")
    written = time.monotonic()
    with working(Stderr(), f"Copying {url}") as report, ThreadPoolExecutor(_THREADS) as pool:
        work = [pool.submit(_fetch, url, storage, files[name], own[name]) for name in missing]
        try:
            for number, (name, done) in enumerate(zip(missing, work, strict=True), start=1):
                done.result()
                kept[name] = wanted[name]
                report(number, len(missing))
                if time.monotonic() - written > _NOTE_EVERY_SECONDS:
                    _note(place / _COPY, kept)
                    written = time.monotonic()
        finally:
            for one in work:
                one.cancel()
            _note(place / _COPY, kept)


def _fetch(url: str, storage: Any, facts: dict[str, Any], target: Path) -> None:
    """One file, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(target) as aside:
        try:
            storage.get_file(facts["name"], str(aside))
        except OSError as error:
            if told := disk_error(error, target):
                raise told from error
            raise UserError(f"{url}: {facts['name']} cannot be read ({error})") from error
        except Exception as error:  # each storage raises its own
            raise UserError(f"{url}: {facts['name']} cannot be read ({type(error).__name__}: {error})") from error
        size = facts.get("size")
        if size is not None and aside.stat().st_size != size:
            raise UserError(
                f"{url}: {facts['name']} came with {aside.stat().st_size} of {size} bytes; repeat the command"
            )


def _version(facts: dict[str, Any]) -> str:
    """What changes when a file does, as far as its storage says."""
    return json.dumps([facts.get("size"), *(str(facts[tag]) for tag in _TAGS if tag in facts)])


def _noted(path: Path) -> dict[str, str]:
    """What was copied before; nothing where that is not known."""
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _note(path: Path, kept: dict[str, str]) -> None:
    with replaced_file(path) as aside:
        aside.write_text(json.dumps(kept), encoding="utf-8")


def _remove_others(folder: Path, own: set[Path]) -> None:
    for path in folder.rglob("*") if folder.is_dir() else ():
        if path.is_file() and path not in own:
            path.unlink()
