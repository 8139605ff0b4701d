"""Configs are understood whole: a key that a family does not read is at its default, or the model is refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewstep.formats.json_files import other_kind


@dataclass(frozen=True)
class KnownKeys:
    """What a family knows of one kind of config.

    Attributes:
        classes: what `_class_name` may be.
        read: keys whose values are honoured.
        elsewhere: keys that steer what this library does itself otherwise (a stock sampler's own spacing and solver),
            and so change nothing here.
    """

    classes: tuple[str, ...]
    read: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()


def refuse_other_keys(config: Mapping[str, Any], known: KnownKeys, what: str, title: str) -> None:
    """Raise ValueError for a class, or a key that is not at its default, which the family does not understand.

    What it does understand is of the kind that its default has: a number, a text, true or false.

    Args:
        config: as the file has it, `_class_name` included.
        what: the component, as messages call it.
        title: the family's.
    """
    kind = config.get("_class_name", "")
    if kind not in known.classes:
        raise ValueError(
            f"its {what} is a {kind or 'component without _class_name'}, whose arithmetic is not that of {title} here; "
            f"known are {', '.join(known.classes)}"
        )
    defaults = _defaults(kind)
    for name, value in config.items():
        if name.startswith("_"):
            continue
        if name in known.read and (wanted := other_kind(value, defaults.get(name))):
            raise ValueError(f"its {what} has {name}={str(value)[:60]}, which is not {wanted}")
        if name in known.read or name in known.elsewhere:
            continue
        if value is None or value is False or (name in defaults and _same(value, defaults[name])):
            continue
        raise ValueError(f"its {what} has {name}={value!r}, which this version does not understand for {title}")


def with_defaults(config: Mapping[str, Any], kind: str, known: KnownKeys) -> dict[str, Any]:
    """A config, and of the honoured keys that it leaves out those in which its class is unlike the first known one.

    The families assume what the first known class has.

    Args:
        kind: the class, one of those known.

    Raises:
        ValueError: it leaves some out, and what its class has for them cannot be asked, for lack of a library.
    """
    own, assumed = _defaults(kind), _defaults(known.classes[0])
    absent = [name for name in known.read if name in assumed and name not in config]
    if absent and not own:
        raise ValueError(
            f"its {kind} leaves out {absent[0]}, and its class is not installed here; write it into the config"
        )
    return {**config, **{name: own[name] for name in absent if name in own and own[name] != assumed[name]}}


def _defaults(kind: str) -> dict[str, Any]:
    """The defaults of a diffusers class's settings."""
    import diffusers

    from fewstep.networks.components import signature_defaults

    return signature_defaults(getattr(diffusers, kind))


def _same(value: Any, default: Any) -> bool:
    """Equal, where JSON has lists for tuples."""
    return bool(value == default or (isinstance(default, tuple) and value == list(default)))
