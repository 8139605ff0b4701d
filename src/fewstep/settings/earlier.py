"""Settings of earlier versions: where each key that is gone belongs today, also where one recipe is laid over another."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from fewstep.errors import UserError

if TYPE_CHECKING:
    from fewstep.settings.tree import Tree

Put = Callable[[Any, Any], Any]


def instead(value: Any, earlier: Any) -> Any:
    """An earlier key that only had another name."""
    return earlier


class Earlier(NamedTuple):
    """Where an earlier key belongs.

    Attributes:
        name: of today's setting, in the same group.
        put: (today's value so far, the earlier key's) to today's value.
        silent: the earlier key's default, where today's setting stood beside it: there it says nothing.
        together: both might be set, and then meant one thing.
    """

    name: str
    put: Put = instead
    silent: Any = None
    together: bool = False


def entry(place: int, length: int) -> Put:
    """An earlier key that is one entry of a list today, over which a single number stands for all entries."""

    def put(value: Any, earlier: Any) -> Any:
        entries = list(value) if isinstance(value, list | tuple) else [value] * length
        if len(entries) == length:  # else it is wrong as it is, and named as such when it is validated
            entries[place] = earlier
        return entries

    return put


def renew_keys(
    kind: "type[Tree]", values: dict[str, Any], under: dict[str, Any] | None, prefix: str
) -> dict[str, Any]:  # fmt: skip
    """A group's values with its earlier keys under today's names.

    Args:
        under: what these values are laid over, in today's names; an earlier key then changes its part of that. None: nothing.
        prefix: of the group, "section.".

    Raises:
        UserError: an earlier key and today's are both set.
    """
    found = {key: value for key, value in values.items() if key in kind.earlier}
    kept = {key: value for key, value in values.items() if key not in found}
    given = dict(kept)
    for key, value in found.items():
        name, put, silent, together = kind.earlier[key]
        default = kind.model_fields[name].default
        if value == silent and (name in given or under is None) and silent is not None:
            continue
        if name in given and not together and (silent is None or given[name] not in (default, value)):
            old = " and ".join(f"{prefix}{one}" for one in kind.earlier if kind.earlier[one].name == name)
            raise UserError(f"{prefix}{name} is one setting for what was {old}: set it alone")
        kept[name] = put(kept.get(name, (under or {}).get(name, default)), value)
    return kept


def today(kind: "type[Tree]", prefix: str = "") -> dict[str, str]:
    """{earlier dotted key: today's} of a whole tree."""
    found = {f"{prefix}{old}": f"{prefix}{new.name}" for old, new in kind.earlier.items()}
    for name, group in kind.groups().items():
        found |= today(group, f"{prefix}{name}.")
    return found
