"""Settings as frozen, validated trees: TOML recipes plus `key=value`, every mistake named with the nearest right key."""

import difflib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from fewstep.errors import UserError
from fewstep.settings.earlier import Earlier, renew_keys, today

_MOST_PARTS = 100  # of a dotted key
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
SettingsT = TypeVar("SettingsT", bound="Tree")
Tell = Callable[[str], None]


class Tree(BaseModel):
    """Base of every settings group: frozen, nothing unknown, nothing coerced between kinds, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    command: ClassVar[str] = ""
    """The command whose settings these are, for the whole tree of one."""
    instead: ClassVar[dict[str, str]] = {}
    """What decides today where a key of earlier versions is gone."""
    earlier: ClassVar[dict[str, Earlier]] = {}
    """Keys of earlier versions that have another name today, or are an entry of a list."""

    @classmethod
    def renewed(cls, values: dict[str, Any], under: dict[str, Any]) -> dict[str, Any]:
        """This group's values with what else earlier versions wrote put where it belongs now.

        Args:
            under: the group's values of a recipe that these are laid over.

        Raises:
            UserError: an earlier key has a value that cannot be carried over.
        """
        return values

    @classmethod
    def groups(cls) -> dict[str, type["Tree"]]:
        """The groups of settings in this one, by name."""
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Tree)}


def note(description: str) -> Any:
    """A field that nothing reads but people: no setting."""
    return Field("", description=description, json_schema_extra={"note": True})


def renamed(values: dict[str, Any], old: dict[str, Any], new: str) -> dict[str, Any]:
    """Values with one of several earlier keys under the one there is now; an earlier key at its default says nothing.

    Args:
        old: earlier keys with their defaults.
        new: dotted key of today.

    Raises:
        UserError: two of them are set.
    """
    given = {key: values[key] for key, default in old.items() if key in values and values[key] != default}
    kept = {key: value for key, value in values.items() if key not in old}
    name = new.rpartition(".")[2]
    if len(given) + (kept.get(name, "") != "") > 1:
        raise UserError(f"{new} is one setting for what were {' and '.join(old)}: set it alone")
    return kept | ({name: next(iter(given.values()))} if given else {})


def without_unread(values: dict[str, Any], unread: dict[str, Any]) -> dict[str, Any]:
    """Values without keys that were never read and are at their defaults; one that was set stays, to be refused."""
    return {key: value for key, value in values.items() if key not in unread or value != unread[key]}


def parse_settings(
    kind: type[SettingsT], values: dict[str, Any], source: str, tell: Tell | None = None
) -> SettingsT:  # fmt: skip
    """Validate a nested dict; keys of earlier versions are read, and `tell` gets a line for each group that has some.

    Raises:
        UserError: an unknown key (with the nearest right one), a wrong type or an impossible combination; the
            message names `source` and the dotted key.
    """
    values = renew_settings(kind, values, source, tell)
    _refuse_unknown(kind, values, source)
    try:
        # JSON mode: lists become tuples and integers floats, which TOML and key=value cannot spell otherwise
        return kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_explain(item) for item in error.errors())) from None


def load_settings(
    kind: type[SettingsT], recipe: str | Path, overrides: list[str] | None = None, tell: Tell | None = None
) -> SettingsT:  # fmt: skip
    """Read a TOML recipe, apply `section.key=value` overrides, validate.

    A recipe may name another with a top-level `extends = "other.toml"` (relative to itself) and then states only
    its differences.

    Raises:
        UserError: the file is missing or not TOML, an override is not key=value, or validation fails.
    """
    values, changes = _read_recipe(kind, Path(recipe), (), tell), dict[str, Any]()
    for override in overrides or []:
        _apply_override(changes, override, values)
    return parse_settings(kind, lay_over(kind, values, changes, str(recipe), tell), str(recipe))


def renew_settings(
    kind: type[Tree], values: dict[str, Any], source: str, tell: Tell | None = None, under: dict[str, Any] | None = None
) -> dict[str, Any]:  # fmt: skip
    """A nested dict with the keys of earlier versions put where they belong now.

    Args:
        under: what it will be laid over, renewed; an earlier key then changes its part of that.

    Raises:
        UserError: an earlier key stands beside today's, or has a value that cannot be carried over; names `source`.
    """
    try:
        return _renew(kind, values, "", tell, under)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def lay_over(
    kind: type[Tree], values: dict[str, Any], changes: dict[str, Any], source: str, tell: Tell | None = None
) -> dict[str, Any]:  # fmt: skip
    """Renewed values with changes over them, in which earlier keys count as much as today's.

    Raises:
        UserError: as `renew_settings`.
    """
    return _merge(values, renew_settings(kind, changes, source, tell, under=values))


def describe_settings(kind: type[Tree], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Rows (dotted key, type, default, meaning) of every setting, for `--help` and the docs."""
    rows: list[tuple[str, str, str, str]] = []
    for name, field in kind.model_fields.items():
        annotation: Any = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Tree):
            rows += describe_settings(annotation, f"{prefix}{name}.")
        elif not is_note(field):
            type_name = getattr(annotation, "__name__", str(annotation)).replace("typing.", "")
            rows.append((prefix + name, type_name, repr(field.default), field.description or ""))
    return rows


def is_note(field: FieldInfo) -> bool:
    """Whether nothing but people read a field."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("note"))


def flatten_settings(settings: Tree) -> dict[str, Any]:
    """{dotted key: value} of a whole tree, in JSON types."""
    flat: dict[str, Any] = {}

    def walk(values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    walk(settings.model_dump(mode="json"), "")
    return flat


def _read_recipe(kind: type[Tree], path: Path, seen: tuple[Path, ...], tell: Tell | None) -> dict[str, Any]:
    if not path.is_file():
        wrong = "is no file" if path.exists() else "does not exist"
        first = ", and one comes before the settings (section.key=value)" if "=" in path.name else ""
        raise UserError(f"recipe {path} {wrong}; the shipped ones lie in recipes/{first}")
    if path.resolve() in seen:
        raise UserError(f"recipe {path} extends itself")
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors begin it with a mark
        if any(line.partition("=")[0].count(".") > _MOST_PARTS for line in text.split("\n")):
            raise RecursionError  # the parser takes minutes and gigabytes
        values = tomllib.loads(text)
    except RecursionError:
        raise UserError(f"recipe {path} is nested without end") from None
    except ValueError as error:  # also numbers of thousands of digits
        raise UserError(f"recipe {path} is not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read ({error.strerror or error})") from None
    parent = values.pop("extends", None)
    if parent is None:
        return renew_settings(kind, values, str(path), tell)
    if not isinstance(parent, str):
        raise UserError(f"recipe {path}: extends must name a recipe file")
    base = _read_recipe(kind, path.parent / parent, (*seen, path.resolve()), tell)
    return lay_over(kind, base, values, str(path), tell)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(values: dict[str, Any], override: str, recipe: dict[str, Any]) -> None:
    """Put one `section.key=value` into the values that will be laid over a recipe's."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"{override!r} is not a setting: write section.key=value, e.g. training.batch_size=64")
    *sections, name = key.strip().split(".")
    under: Any = recipe
    for section in sections:
        values = values.setdefault(section, {})
        under = under.get(section, {})
        if not isinstance(values, dict) or not isinstance(under, dict):
            raise UserError(f"{override!r}: {section} is a value, not a section")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text  # a bare word is a string, as a shell user writes it
    values[name] = value if isinstance(value, str | int | float | list | dict) else text  # dates are text too


def _renew(
    kind: type[Tree], values: dict[str, Any], prefix: str, tell: Tell | None, under: dict[str, Any] | None
) -> dict[str, Any]:  # fmt: skip
    """A group and the groups in it with keys of earlier versions put where they belong now."""
    renewed = kind.renewed(renew_keys(kind, values, under, prefix), under or {})
    gone = [f"{prefix}{key}" for key in values if key not in renewed]
    new = [f"{prefix}{key} = {value!r}" for key, value in renewed.items() if key not in values or value != values[key]]
    if gone and tell is not None:
        new += [kind.instead[key] for key in values if key not in renewed and key in kind.instead]
        tell(f"{', '.join(gone)}: now {', '.join(new) or 'left out'}")
    for key, group in kind.groups().items():
        value, below = renewed.get(key), None if under is None else under.get(key, {})
        if isinstance(value, dict) and (below is None or isinstance(below, dict)):
            renewed = {**renewed, key: _renew(group, value, f"{prefix}{key}.", tell, below)}
    return renewed


def _refuse_unknown(kind: type["Tree"], values: dict[str, Any], source: str) -> None:
    known = {row[0] for row in describe_settings(kind)}

    def walk(group: type[Tree], values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if key not in group.model_fields:
                raise UserError(f"{source}: unknown setting {prefix}{key}{_hint(kind, group, prefix, key, known)}")
            annotation: Any = group.model_fields[key].annotation
            if isinstance(annotation, type) and issubclass(annotation, Tree):
                if not isinstance(value, dict):
                    raise UserError(f"{source}: {prefix}{key} is a section, not a value: set {prefix}{key}.<name>")
                walk(annotation, value, f"{prefix}{key}.")
            elif type(value) not in (str, int, float, bool, list, dict):
                raise UserError(f"{source}: {prefix}{key}={value} has a type no setting has; put it in quotes")

    walk(kind, values, "")


def _hint(kind: type["Tree"], group: type["Tree"], prefix: str, key: str, known: set[str]) -> str:
    """The nearest right key: the other command's for a whole section, the same name in another one, a similar one here."""
    if not prefix and any(
        row[0].startswith(f"{key}.") for other in _other_commands(kind) for row in describe_settings(other)
    ):
        return _of_other_command(kind, key)
    names = {dotted: dotted for dotted in sorted(known)} | today(kind)
    same_name = [right for dotted, right in names.items() if dotted.rsplit(".", 1)[-1] == key]
    if same_name:
        return f"; did you mean {same_name[0]}?"
    near = difflib.get_close_matches(key, [*group.model_fields, *group.earlier], n=1, cutoff=0.6)
    if near:
        right = group.earlier[near[0]].name if near[0] in group.earlier else near[0]
        return f"; did you mean {prefix}{right}?"
    return _of_other_command(kind, f"{prefix}{key}")


def _of_other_command(kind: type["Tree"], key: str) -> str:
    """Whose recipes have this key; empty: nobody's."""
    found = (other for other in _other_commands(kind) if key in _sections_and_keys(other))
    return next((f"; it belongs to recipes of `fewstep {other.command}`" for other in found), "")


def _other_commands(kind: type["Tree"]) -> list[type["Tree"]]:
    """The settings of the other commands that have recipes."""
    return [other for other in Tree.__subclasses__() if other is not kind and other.command]


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}={item['input']!r}: {message}" if key else message


def _sections_and_keys(kind: type[Tree]) -> set[str]:
    keys = {row[0] for row in describe_settings(kind)} | today(kind).keys()
    return keys | {key.rsplit(".", 1)[0] for key in keys}
