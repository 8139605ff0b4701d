"""Whether tensors are those a network needs: one comparison and one sentence for every place weights come from."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from fewstep.errors import UserError

_SHOWN = 2  # names of each kind in a message


class HasShape(Protocol):
    """A tensor, on any device, or the slice of one in a file."""

    @property
    def shape(self) -> Any:
        """Lengths of its axes."""


def compare_state(
    found: Mapping[str, HasShape | tuple[int, ...]], expected: Mapping[str, HasShape | tuple[int, ...]], what: str,
    where: str, remedy: str = "",
) -> None:  # fmt: skip
    """Refuse tensors that are not exactly the expected ones.

    Args:
        found: tensors, or their shapes, by name; on the meta device they do as well.
        expected: the same of the network that should take them.
        what: what should take them, e.g. "generator".
        where: file or folder they come from.
        remedy: what the user can do, as the end of a sentence.

    Raises:
        UserError: names are missing or unexpected, or shapes differ; says how many of each, and names some.
    """
    if fault := state_difference(found, expected):
        raise UserError(f"{where}: its {what} is another network than expected: {fault}" + (remedy and f"; {remedy}"))


def state_difference(
    found: Mapping[str, HasShape | tuple[int, ...]], expected: Mapping[str, HasShape | tuple[int, ...]]
) -> str:
    """How the tensors differ from the expected ones, in words; empty where they do not."""
    other = [
        f"{name} {_shape(found[name])} for {_shape(value)}"
        for name, value in expected.items()
        if name in found and _shape(found[name]) != _shape(value)
    ]
    faults = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": other,
    }
    total = sum(map(len, faults.values()))
    parts = [f"{len(names)} {kind} ({_some(names)})" for kind, names in faults.items() if names]
    return f"of its tensors, {', '.join(parts)}" if total else ""


def _shape(value: HasShape | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else tuple(value.shape)


def _some(names: Iterable[str]) -> str:
    names = [" ".join(name[:100].split()) for name in names]  # a damaged file's may be anything
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"e.g. {', '.join(names[:_SHOWN])}{more}" if len(names) > 1 else names[0]
