"""Settings from Python: a recipe, a dictionary or settings that are there already, with changes by keyword."""

import json
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any, TypeVar

from fewstep.errors import UserError
from fewstep.settings import Tree, lay_over, load_settings, parse_settings, renew_settings

SettingsT = TypeVar("SettingsT", bound=Tree)


def gather_settings(
    kind: type[SettingsT], given: "SettingsT | Mapping[str, Any] | str | PathLike[str]", overrides: Mapping[str, Any]
) -> SettingsT:
    """Settings of one kind from whatever a caller has.

    Args:
        given: settings of this kind, a recipe's path, or a dictionary: nested, or with dotted keys.
        overrides: changes, "section__name" or "section.name" to value.

    Raises:
        UserError: a recipe that is not there, an unknown setting, a value that does not fit.
    """
    changes = {key.replace("__", "."): _plain(value) for key, value in overrides.items()}
    if isinstance(given, kind):
        if not changes:
            return given
        values: dict[str, Any] = given.model_dump(mode="json", exclude_unset=True)
    elif isinstance(given, Mapping):
        values = renew_settings(
            kind, _nested({key.replace("__", "."): _plain(value) for key, value in given.items()}), "settings"
        )
    elif isinstance(given, str | PathLike):
        lines = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items()]
        return load_settings(kind, fspath(given), lines)
    else:
        raise UserError(
            f"{type(given).__name__} is neither {kind.__name__} nor a dictionary nor the path of a recipe; see "
            "fewstep.load_settings"
        )
    return parse_settings(kind, lay_over(kind, values, _nested(changes), "settings"), "settings")


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections."""
    values: dict[str, Any] = {}
    for key, value in flat.items():
        _set(values, key, value)
    return values


def _plain(value: Any) -> Any:
    """A value in JSON's types."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(part) for part in value]
    return fspath(value) if isinstance(value, PathLike) else value


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Put a value at a dotted key; sections are merged."""
    section, dot, rest = key.partition(".")
    inner = values.setdefault(section, {}) if dot or isinstance(value, dict) else None
    if dot:
        if not isinstance(inner, dict):
            raise UserError(f"{key}: {section} is a value, not a section")
        _set(inner, rest, value)
    elif isinstance(value, dict):
        if not isinstance(inner, dict):
            raise UserError(f"{key} is a value, not a section")
        for name, part in value.items():
            _set(inner, name, part)
    else:
        values[section] = value
