"""A pickle machine that executes nothing, because the ordinary way of loading runs code from the file."""

from __future__ import annotations

import mmap
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from fewstep.errors import UserError

_MAX_NAME = 256
_NUMBERS = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"})
_TEXTS = frozenset(
    {
        "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "SHORT_BINSTRING",
        "BINSTRING",
    }
)  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
T = TypeVar("T")


def read_pickled_strings(path: str | Path) -> list[str]:
    """The strings of a pickled list[str], as prompt lists are published, without executing anything in the file.

    Memory and time grow with the file's size, whatever it claims to hold.

    Raises:
        UserError: missing, damaged, cut short, or anything but one list of strings. The message names the file.
    """
    path = Path(path)

    def read(stream: mmap.mmap) -> list[str]:
        budget = Budget(len(stream), "list of strings")  # an opcode takes a byte at least
        content = InertMachine(frozenset(), budget).run(stream)
        if not isinstance(content, list):
            raise ValueError(f"it holds a {type_name(type(content))}, not a list of strings")
        for number, item in enumerate(content):
            if not isinstance(item, str):
                raise ValueError(f"item {number} of its list is a {type_name(type(item))}, not a string")
        if stream.tell() != len(stream):
            raise ValueError("it goes on after its first list")
        return content

    return read_inert(path, "list of strings", 2, read, "Give a pickled list[str], or a text file of one prompt a line")


def read_inert(path: Path, kind: str, lowest_protocol: int, read: Callable[[mmap.mmap], T], advice: str) -> T:
    """What `read` makes of a pickle file, each of its failures turned into one sentence.

    Args:
        path: the file.
        kind: what the file should be, as messages call it.
        lowest_protocol: of pickle, 2 or more; 5 is the highest.
        read: gets the file mapped, because a read of the 2^60 bytes an opcode may announce then allocates only what
            there is.
        advice: what the user can do, a sentence without its full stop.

    Raises:
        UserError: the file is missing, or `read` failed.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
            _check_start(stream[:4], lowest_protocol)
            return read(stream)
    except Exception as error:
        known = isinstance(error, ValueError | OSError)
        reason = str(error) if known else f"it is damaged ({type(error).__name__}: {error})"
        told = f"{path}: not a readable {kind}: {reason}; nothing in it was executed"
        raise UserError(f"{told}. {advice}") from error


def _check_start(start: bytes, lowest: int) -> None:
    if start.startswith(b"PK"):
        raise ValueError("this is a zip archive, as torch.save writes, not a pickle")
    if len(start) < 2 or start[0] != 0x80 or not lowest <= start[1] <= 5:
        numbers = ", ".join(str(number) for number in range(lowest, 5))
        raise ValueError(f"it does not start like a pickle of protocol {numbers} or 5")


class Budget:
    """Counts down over the whole file, so that no arrangement of references makes reading it endless.

    Attributes:
        kind: what the file should hold, as messages call it.
    """

    def __init__(self, steps: int, kind: str) -> None:
        self._left, self.kind = steps, kind

    def spend(self, steps: int = 1) -> None:
        """Take steps; raises ValueError when none are left."""
        self._left -= steps
        if self._left < 0:
            raise ValueError(f"it has more pieces than any {self.kind}")


# Records that stand for what the file asked to build. They compare by identity and hold no behaviour.
@dataclass(eq=False, repr=False, slots=True)
class Global:
    """The name of a class or function."""

    name: str


@dataclass(eq=False, repr=False, slots=True)
class PersistentId:
    """What torch's pickles say instead of a storage."""

    value: object


class InertMachine:
    """The pickle stack machine for the opcodes pickle.dump writes, except that nothing is imported or called.

    Built on `pickletools.genops`, not `pickle.Unpickler`: without asking any hook of a subclass, that lets a
    file allocate 64 GiB of memo in six bytes, and hash a key nested deep enough to end the process.

    Args:
        allowed: names of the globals the file may mention; they stay names.
        budget: steps that reading may take.

    Attributes:
        other_keys: kinds that a dictionary's keys may be of besides text.
    """

    other_keys: tuple[type, ...] = ()

    def __init__(self, allowed: frozenset[str], budget: Budget) -> None:
        self._allowed = allowed
        self.budget = budget
        self._stack: list[object] = []
        self._marks: list[list[object]] = []
        self._memo: dict[object, object] = {}

    def record(self, name: str, args: tuple[object, ...]) -> object:
        """What the call of an allowed global would have built, as data; raises ValueError where it is not expected."""
        raise ValueError(f"it calls {name} with unexpected arguments")

    def set_state(self, target: object, state: object) -> None:
        """What setting an object's state would have done; attributes on a dict carry nothing we need: dropped."""
        expect(dict, target)
        expect(dict, state)

    def run(self, stream: IO[bytes] | mmap.mmap) -> object:
        """The object of the stream's first pickle, made of plain values and records."""
        for opcode, arg, _ in pickletools.genops(stream):  # type: ignore[arg-type]  # mmap is a file where it matters
            self.budget.spend()
            if opcode.name == "STOP":
                break
            self._step(opcode.name, arg)
        return self._stack.pop()

    def _step(self, name: str, arg: object) -> None:
        stack = self._stack
        match name:
            case _ if name in _NUMBERS or name in _TEXTS:
                stack.append(arg)
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case _ if name in _EMPTY:
                stack.append(_EMPTY[name]())
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._marks.append(stack)
                self._stack = []
            case "TUPLE":
                items = self._pop_mark()
                self._stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "APPEND":
                item = stack.pop()
                expect(list, stack[-1]).append(item)
            case "APPENDS":
                items = self._pop_mark()
                expect(list, self._stack[-1]).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                expect(dict, stack[-1])[self._key(key)] = value
            case "SETITEMS":
                items = self._pop_mark()
                keys = [self._key(key) for key in items[::2]]
                expect(dict, self._stack[-1]).update(zip(keys, items[1::2], strict=True))
            case "ADDITEMS":
                items = self._pop_mark()
                expect(set, self._stack[-1]).update([expect(str, item) for item in items])
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self._memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[arg])
            case _:
                self._step_inert(name, arg)

    def _key(self, key: object) -> object:
        return key if type(key) in self.other_keys else expect(str, key)

    def _step_inert(self, name: str, arg: object) -> None:
        """The opcodes that import, call and set state in a real unpickler."""
        stack = self._stack
        match name:
            case "GLOBAL":
                stack.append(self._global(expect(str, arg).replace(" ", ".")))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self._global(f"{expect(str, module)}.{expect(str, attribute)}"))
            case "REDUCE" | "NEWOBJ":
                args, called = stack.pop(), stack.pop()
                stack.append(self.record(expect(Global, called).name, expect(tuple, args)))
            case "BUILD":
                state = stack.pop()
                self.set_state(stack[-1], state)
            case "BINPERSID":
                stack.append(PersistentId(stack.pop()))
            case _:
                raise ValueError(f"it uses the pickle opcode {name}, which no {self.budget.kind} needs")

    def _pop_mark(self) -> list[object]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _global(self, name: str) -> Global:
        if name not in self._allowed:
            raise ValueError(f"it asks for the global {name[:_MAX_NAME]!r}, which no {self.budget.kind} needs")
        return Global(name)


def expect(kind: type[T], value: object) -> T:
    """The value; raises ValueError when it is of another kind."""
    if not isinstance(value, kind):
        raise ValueError(f"it has a {type_name(type(value))} where a {type_name(kind)} belongs")
    return value


def type_name(kind: type) -> str:
    """A type as messages call it."""
    return kind.__name__.strip("_").lower()
