"""A network's folder by its path or its name on the hub, of which only what is read is downloaded."""

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

from fewstep.errors import UserError
from fewstep.formats.hub_faults import hub_reason
from fewstep.formats.source import Source


def network_folder(source: str | Path, files: Sequence[str], what: str, example: str) -> Path:
    """Where a network lies on this machine.

    Args:
        source: a folder or a hub id.
        files: names, or patterns of names, that are downloaded from the hub.
        what: with its article, e.g. "a CLIP", for messages.
        example: the hub id of one, for messages.

    Raises:
        UserError: neither a folder nor a hub id, or it cannot be fetched; names it.
    """
    place = Source.parse(source)
    if place.path is not None:
        if not place.path.is_dir():
            raise UserError(f"{source} is neither a folder nor a hub id (org/name) of {what}, e.g. {example}")
        return place.path
    try:
        return Path(huggingface_hub.snapshot_download(place.hub_id, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises many kinds; all mean the same to a user
        raise UserError(
            f"{place.hub_id} is no local folder and cannot be fetched from the hub ({hub_reason(error)}); "
            "check the name and the network, or download it and give the folder"
        ) from error
