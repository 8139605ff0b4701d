"""Work that several processes share, and what they check of each other: a fault of one is told by all, and none waits for ever."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

from fewstep.errors import UserError, disk_error
from fewstep.parallel import agreed, gathered, is_first, rank, received_by_the_first

T = TypeVar("T")


def by_the_first(work: Callable[[], T], group: Any = None) -> T | None:
    """Let the first process do something once, while the others wait; its result is None on them.

    Args:
        group: over which the others hear of it.

    Raises:
        UserError: the first process's, on all; also for a disk that is full or not writable.
    """
    result, fault = _tried(work) if is_first() else (None, None)
    _raise_any(fault, [agreed(_words(fault), group)])
    return result


def by_all(work: Callable[[], T]) -> list[T]:
    """Every process's result, in their order; what goes wrong in one is told by all.

    Raises:
        UserError: of any process; also for a disk that is full or not writable.
    """
    result, fault = _tried(work)
    found = gathered((result, _words(fault)))
    _raise_any(fault, [words for _, words in found])
    return [cast(T, own) for own, _ in found]


def shared_out(
    work: Callable[[int], T], count: int, processes: int, begins: Callable[[int], None] = lambda number: None
) -> list[T]:
    """What `work` makes of the numbers 0 to count - 1, in their order, on the first process; nothing on the others.

    In each round every process does the next number, so that none waits longer than one takes, and what goes wrong in one
    is told by all after that round.

    Args:
        processes: all of them, or 1: this one does everything, whatever there are.
        begins: told the first number of each round.

    Raises:
        UserError: as `by_all`.
    """
    found: list[T] = []
    for first in range(0, count, processes):
        begins(first)
        found += [work(first)] if processes == 1 else _round(work, range(first, min(first + processes, count)))
    return found


def _round(work: Callable[[int], T], numbers: range) -> list[T]:
    """The results of the processes that have a number, on the first process."""
    result, fault = _tried(lambda: work(numbers[rank()]) if rank() < len(numbers) else None)
    _raise_any(fault, gathered(_words(fault)))
    return cast(list[T], received_by_the_first(result)[: len(numbers)])


def _words(fault: UserError | None) -> str | None:
    return None if fault is None else str(fault)


def _raise_any(fault: UserError | None, words: Iterable[str | None]) -> None:
    """Raise this process's fault, or what another said of its own."""
    told = next((one for one in words if one is not None), None)
    if told is not None:
        raise fault or UserError(told)


def _tried(work: Callable[[], T]) -> tuple[T | None, UserError | None]:
    """What work gives, or what is told to users of its failure, a full disk's included."""
    try:
        return work(), None
    except UserError as error:
        return None, error
    except OSError as error:
        fault = disk_error(error)
        if fault is None:
            raise
        return None, fault


def refuse_differences(facts: str, what: str) -> None:
    """Raise UserError, naming the process, where facts that must be the same are not."""
    digests = gathered(hashlib.sha256(facts.encode()).hexdigest())
    others = [number for number, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise UserError(
            f"process {', '.join(map(str, others))} has other {what} than process 0; start the same command with the same files "
            "everywhere"
        )


def refuse_unshared(folder: Path, option: str) -> None:
    """Make a folder; raise UserError, naming the process, where the processes do not see one folder.

    Args:
        option: what names the folder, for the message.
    """
    name = f".{agreed(uuid4().hex)}.writing"

    def leave_sign() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        except OSError as error:
            raise UserError(f"cannot write in {folder}: {error}; choose another {option}") from error

    by_the_first(leave_sign)
    blind = [number for number, seen in enumerate(gathered((folder / name).exists())) if not seen]
    if is_first():
        (folder / name).unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"process {', '.join(map(str, blind))} does not see what process 0 writes in {folder}: give a {option} on a disk "
            "that all machines share"
        )
