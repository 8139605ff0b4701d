"""Folders and files that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fewstep.errors import UserError


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A fresh folder that becomes `target` when the block ends well, and disappears when it does not.

    Raises:
        UserError: writing failed (disk full, no permission); `target` is as it was before.
    """
    aside = target.parent / f".{target.name}.writing"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for path in [*aside.rglob("*"), aside]:
            flush_to_disk(path)
        if target.exists():
            shutil.rmtree(target)
        os.rename(aside, target)
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

    Raises:
        UserError: writing failed; `target` is as it was before.
    """
    aside = target.with_name(f".{target.name}.writing")
    try:
        yield aside
        os.replace(aside, target)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"cannot write {target}: {error}; free some space or choose another folder") from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def flush_to_disk(path: Path) -> None:
    """fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
