"""Folders and files that appear whole or not at all.

A folder that is replaced is set aside as `.NAME.replaced`, the new one is renamed into its place, and then the old one is
removed: whatever moment a process dies at, one of the two lies there whole. `standing` finds it.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from fewstep.errors import UserError


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A fresh folder that becomes `target` when the block ends well, and disappears when it does not.

    Raises:
        UserError: writing failed (disk full, no permission); `target` is as it was before.
    """
    aside = _aside(target)
    try:
        _finish_replacing(target)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for path in [*aside.rglob("*"), aside]:
            flush_to_disk(path)
        _replace_folder(aside, target)
        flush_to_disk(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"cannot write {target}: {error}; nothing was left half-written. Free some space or choose another "
            "folder, then repeat the command"
        ) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def replaced_file(target: Path) -> Iterator[Path]:
    """A path to write to that becomes `target` when the block ends well: readers see the old file or the new.

    Only nothing or a regular file is replaced. A link stays, and the file it leads to is replaced; what is written for
    a device or a pipe (/dev/null, /dev/stdout) goes into it.

    Raises:
        UserError: writing failed, or `target` is a folder; `target` is as it was before.
    """
    if target.is_dir():
        raise UserError(f"cannot write {target}: it is a folder; give the name of a file")
    place = Path(os.path.realpath(target))
    into = place.exists() and not place.is_file()  # a device, a pipe or a socket
    folder = Path(tempfile.mkdtemp()) if into else place.parent
    aside = folder / f".{target.name}.writing"
    try:
        yield aside
        if into:
            with aside.open("rb") as source, place.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        else:
            os.replace(aside, place)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {target}: {error}; free some space or choose another folder") from error
    finally:
        with suppress(OSError):  # a read-only or full disk refuses even this
            aside.unlink(missing_ok=True)
        if into:
            shutil.rmtree(folder, ignore_errors=True)


def standing(target: Path) -> Path:
    """`target`, or the old folder beside it where a kill in the middle of replacing it left only that.

    The next writer puts it back; a reader leaves it where it is, because the writer may be alive and between its two renames.
    """
    if not target.name:  # the folder where the user is, the root
        return target
    replaced = _replaced(target)
    return replaced if not target.exists() and replaced.is_dir() else target


def is_leftover(path: Path) -> bool:
    """Whether a name is one that only a killed process leaves behind."""
    return path.name.startswith(".") and path.suffix in (".writing", ".replaced")


def remove_leftovers(folder: Path) -> None:
    """Tidy what a killed process left directly below `folder`: half-written things go, replaced folders come back.

    What cannot be removed stays: it does no harm but to be there.
    """
    if not folder.is_dir():
        return
    for path in [path for path in folder.iterdir() if is_leftover(path)]:
        if path.suffix == ".replaced":
            target = folder / path.name.removeprefix(".").removesuffix(".replaced")
            with suppress(OSError):
                _finish_replacing(target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def flush_to_disk(path: Path) -> None:
    """fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.writing")


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _replace_folder(new: Path, target: Path) -> None:
    """Rename `new` to `target`; an earlier folder there is removed when the new one stands."""
    if not target.exists():
        os.rename(new, target)
        return
    replaced = _replaced(target)
    if target.is_symlink() or not target.is_dir():
        raise OSError(f"{target} is not a folder of its own")
    os.rename(target, replaced)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(replaced, target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _finish_replacing(target: Path) -> None:
    """End what a kill interrupted: the old folder comes back where no new one stands, and goes where one does."""
    replaced = _replaced(target)
    if not replaced.is_dir():
        return
    if target.exists():
        shutil.rmtree(replaced)
    else:
        os.rename(replaced, target)
