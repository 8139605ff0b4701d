"""What an export tells of its making, without the folders of the machine it was made on."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

from fewstep.export.card_usage import hub_name
from fewstep.formats.model_folder import ModelCard

_LOCAL = re.compile(r"(/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]).*", re.DOTALL)
_ORIGINS = ("_name_or_path", "name_or_path")  # where transformers and diffusers loaded a component from


def without_local_paths(card: ModelCard, *, keep_base: bool) -> ModelCard:
    """The card with every local path cut down to its last name; hub ids and bundled names stay.

    Args:
        card: of the generator that is exported.
        keep_base: leave `base` and `base_loras` as they are, so that the export finds its base model on this machine.
    """
    base = card.base if keep_base else shareable_base(card.base)
    loras = card.base_loras if keep_base else tuple(_cut(card.base_loras))
    return replace(card, base=base, base_loras=loras, made_with=_cut(card.made_with))


def shareable_base(base: str) -> str:
    """The name of a base model: a hub id, a bundled name, or the last name of a local folder."""
    return hub_name(base) or (Path(base).name if Path(base).exists() else _last_name(base))


def copy_shareable(source: Path, target: Path) -> None:
    """Copy a file of a diffusers component; a config loses the folder that the component was once loaded from.

    Raises:
        OSError: the disk is full.
    """
    shutil.copyfile(source, target)
    if source.name.endswith("config.json"):
        try:
            config = json.loads(source.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):  # no config: whoever loads the component says so
            return
        if (shared := _without_origins(config)) != config:
            target.write_text(json.dumps(shared, indent=1), encoding="utf-8")


def _without_origins(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        name: shareable_base(entry) if name in _ORIGINS and isinstance(entry, str) else _without_origins(entry)
        for name, entry in value.items()
    }


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _cut(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_cut(entry) for entry in value]
    return _last_name(value) if isinstance(value, str) else value


def _last_name(text: str) -> str:
    """ "/home/ann/sdxl" as "sdxl"; text that is no path stays."""
    if not _LOCAL.fullmatch(text) or "\n" in text:
        return text
    found = hub_name(text)
    return found or PureWindowsPath(text).name or Path(text).name
