"""One process at a time in a folder: a lock that ends with its process, however that ends."""

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from fewstep.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has none: there folders are not locked
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # a killed process leaves it behind, unlocked


class FolderLock:
    """A folder held from its making on, until `release` or this process's end; file systems without locks let everybody in.

    The lock lies on a file, for network file systems lock no folders.

    Args:
        refusal: what is said where another process holds the folder.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """

    def __init__(self, folder: Path, refusal: str) -> None:
        self._path = folder / LOCK
        self._file = self._take(refusal)
        for _ in range(8):  # more often only where a file system numbers its files anew each time
            if _lies_at(self._path, self._file.fileno()):
                return
            self._file.close()  # its holder removed it between our opening and our lock
            self._file = self._take(refusal)

    def _take(self, refusal: str) -> IO[str]:
        try:
            file = open(self._path, "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error}; choose another folder") from error
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(refusal) from None
        except OSError:
            pass  # a file system without locks
        return file

    def release(self) -> None:
        """Let other processes in."""
        if not self._file.closed:
            if _lies_at(self._path, self._file.fileno()):  # and no other, of a folder that was made anew meanwhile
                with suppress(OSError):
                    self._path.unlink()
            self._file.close()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_locked(folder: Path) -> bool:
    """Whether a process holds a folder, as far as its file system tells; the lock is tried for a moment."""
    try:
        with open(folder / LOCK, encoding="utf-8") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # no lock, or a file system without any
    return False


def _lies_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
