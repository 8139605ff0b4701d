"""The one exception whose message is meant for a person: it names a file or a setting and says what to do."""

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENOTDIR,
    errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO, errno.EBUSY, errno.ESTALE, errno.EEXIST, errno.ENOTEMPTY,
    errno.ENOTCONN, errno.ETIMEDOUT, errno.ENODEV,
)  # fmt: skip


class UserError(ValueError):
    """Bad input. The command line prints the message alone and exits with code 2."""


class RunInterrupted(KeyboardInterrupt):
    """A run was asked to stop and saved itself; the message says where.

    Attributes:
        exit_code: what the command line exits with: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


_NO_MEMORY = (
    "there is not enough memory for this; ask for less at once (a smaller batch, microbatch or size, fewer pictures), or see what a "
    "run needs with --dry-run"
)


def first_line(error: BaseException) -> str:
    """What a library says of its failure, without its further lines and not endless; its kind, where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def told_to_users(error: Exception) -> object:
    """What a person is told of an exception that is no fault of the program's; None for one that is."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return disk_error(error)
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return "a path begins with ~, and the home folder it means is not known; write the path out, or set HOME"
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return _NO_MEMORY if isinstance(error, MemoryError) or out_of_memory else None


@contextmanager
def quiet_threads(debug: bool) -> Iterator[None]:
    """A thread of a library that meets a full disk ends without a traceback: what it wrote for (TensorBoard's) meets that and says it.

    Args:
        debug: show it all the same.
    """
    before = threading.excepthook

    def tell(fault: Any) -> None:
        if debug or not isinstance(fault.exc_value, OSError) or told_to_users(fault.exc_value) is None:
            before(fault)

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = before


def stopped_by(stop: KeyboardInterrupt) -> tuple[str, int]:
    """What asked a command to end, as people call it, and the exit code that says so."""
    return ("SIGTERM", 143) if isinstance(stop, Terminated) else ("Ctrl-C", 130)


def disk_error(error: OSError, where: object = "") -> UserError | None:
    """What to tell of a disk that is full, read-only or not ours, or of a path that is no place for files; None for other faults.

    Args:
        where: what was being written, where the error does not say it.
    """
    if error.errno not in _DISK:
        return None
    place = error.filename or where or "a file"
    if error.errno in (errno.EACCES, errno.EPERM):
        return UserError(f"cannot read or write {place}: {error.strerror}; allow it, or choose another place")
    return UserError(
        f"cannot read or write {place}: {error.strerror}; free some space or choose another folder, then repeat the command"
    )
