"""Folders of shards that as many processes fill as torchrun started."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewstep.data.shard_folder import MANIFEST, ShardKind, start_or_continue
from fewstep.formats.remote import refuse_url
from fewstep.parallel import agreed, by_the_first, refuse_differences, refuse_unshared, world_size


def begin(
    folder: Path, job: dict[str, Any], kind: ShardKind, announce: Callable[[], None] = lambda: None,
    ignore: tuple[str, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    """`start_or_continue` for all processes: the manifest that each goes on with.

    Args:
        announce: called by the first process before a new folder is made; may refuse.

    Raises:
        UserError: as `start_or_continue`; the processes have different jobs or do not see one folder.
    """

    def start() -> dict[str, Any]:
        if not (folder / MANIFEST).exists():
            announce()
        return start_or_continue(folder, job, kind, ignore)

    refuse_url(folder, "folder")
    refuse_differences(json.dumps(job, sort_keys=True, default=str), "files or options")
    manifest = agreed(by_the_first(start))
    assert manifest is not None
    if world_size() > 1:
        refuse_unshared(folder, "folder")
    return manifest
