"""What an export tells of its making, without the folders of the machine it was made on."""

import re
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

from fewstep.export.card_usage import hub_name
from fewstep.formats.model_folder import ModelCard

_LOCAL = re.compile(r"(/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]).*", re.DOTALL)


def without_local_paths(card: ModelCard, *, keep_base: bool) -> ModelCard:
    """The card with every local path cut down to its last name; hub ids and bundled names stay.

    Args:
        card: of the generator that is exported.
        keep_base: leave `base` as it is, so that the export finds its base model on this machine.
    """
    base = card.base if keep_base else hub_name(card.base) or _last_name(card.base)
    return replace(card, base=base, made_with=_cut(card.made_with))


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
