"""JSON objects from disk, whoever wrote them: read whole, or refused in one sentence that names the file and the key."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.errors import UserError

_MAX_BYTES = 32 * 2**20  # of a config or card; published ones are a few kilobytes
_HUGE = 1e9  # NaN is not below it either
_KINDS: dict[type, str] = {
    dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number", bool: "true or false",
    type(None): "null",
}  # fmt: skip


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`; what is nested without end is a ValueError like any other damage."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested without end") from None


def read_json_object(path: Path, remedy: str = "download the model again") -> dict[str, Any]:
    """The object a JSON file holds.

    Args:
        path: the file.
        remedy: what the user can do, as the end of a sentence.

    Raises:
        UserError: missing, unreadable, no JSON, nested without end, larger than any config, or no object.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path} has {path.stat().st_size // 2**20} MiB, more than any such file; {remedy}")
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{path} is damaged: it is nested without end; {remedy}") from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds {kind_name(found)}, not an object; {remedy}")
    return found


def entry(values: Mapping[str, Any], key: str, kind: type | tuple[type, ...], path: Path, remedy: str) -> Any:
    """One entry of such an object, of the right kind; true and false are no numbers.

    Raises:
        UserError: it is missing or of another kind; names file and key.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wanted = " or ".join(_KINDS[one] for one in kinds)
    if key not in values:
        raise UserError(f"{path} is damaged: {key} is missing; {remedy}")
    value = values[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UserError(f"{path} is damaged: {key} is {kind_name(value)}, not {wanted}; {remedy}")
    return value


def other_kind(value: Any, default: Any) -> str:
    """What a setting's value should be, where it is not of its default's kind; empty where it is.

    Null is always taken, a list where one number or switch stands for all, and a default of None says nothing. A whole
    default is that of a count.
    """
    if default is None or value is None:
        return ""
    if isinstance(default, bool):
        fits = all(isinstance(part, bool) for part in _flat(value))
        return "" if fits else "true or false"
    if isinstance(default, int | float):
        parts = _flat(value)
        fits = all(isinstance(part, int | float) and not isinstance(part, bool) for part in parts)
        if not (fits and all(abs(part) < _HUGE for part in parts)):
            return "a number of a possible size"
        counts = isinstance(default, int) and default >= 0
        return (
            ""
            if not counts or all(part >= 0 and part == int(part) for part in parts)
            else "a whole number of 0 or more"
        )
    if isinstance(default, str):
        return "" if isinstance(value, str) else "a text"
    return "" if isinstance(value, list | tuple) or not isinstance(default, list | tuple) else "a list"


def _flat(value: Any) -> list[Any]:
    """The values of lists in lists; of anything else itself."""
    return [part for inner in value for part in _flat(inner)] if isinstance(value, list | tuple) else [value]


def kind_name(value: object) -> str:
    """What JSON calls the kind of a value, with its article."""
    return next((name for kind, name in _KINDS.items() if type(value) is kind), type(value).__name__)
