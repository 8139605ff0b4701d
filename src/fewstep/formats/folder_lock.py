"""One process at a time in a folder: a lock that ends with its process, however that ends, and leaves no file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has none: there folders are not locked
    fcntl = None  # type: ignore[assignment]


@contextmanager
def one_process(folder: Path, refusal: str) -> Iterator[None]:
    """Hold a folder; file systems without locks let everybody in.

    Args:
        refusal: what is said where another process holds it.

    Raises:
        UserError: another process holds it.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(refusal) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
