"""Folders of shards that as many processes fill as torchrun started."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.data.shard_folder import MANIFEST, ShardKind, write_manifest, writing
from fewstep.formats.remote import refuse_url
from fewstep.parallel import agreed, rank, world_size
from fewstep.shared_work import by_all, by_the_first, refuse_differences, refuse_unshared


@contextmanager
def begun(
    folder: Path, job: dict[str, Any], kind: ShardKind, announce: Callable[[], None] = lambda: None,
    ignore: tuple[str, ...] = (),
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """`writing` for all processes: the manifest that each goes on with; the first one holds the folder.

    Args:
        announce: called by the first process before a new folder is made; may refuse.

    Raises:
        UserError: as `writing`; the processes have different jobs or do not see one folder.
    """

    refuse_url(folder, "folder")
    refuse_differences(json.dumps(job, sort_keys=True, default=str), "files or options")
    with ExitStack() as held:

        def start() -> dict[str, Any]:
            if not (folder / MANIFEST).exists():
                announce()
            return held.enter_context(writing(folder, job, kind, ignore))

        manifest = agreed(by_the_first(start))
        assert manifest is not None
        if world_size() > 1:
            refuse_unshared(folder, "folder")
        yield manifest


def fill(
    folder: Path, manifest: dict[str, Any], num_shards: int, make: Callable[[int], dict[str, Any] | None],
    done: Callable[[int], None] = lambda num_shards: None,
) -> None:  # fmt: skip
    """Make the shards that are missing: in each round every process the next one, then all are noted.

    Args:
        make: writes the shard of a number and returns its entry, None behind the last.
        done: told the number of finished shards after each round.
    """
    while len(manifest["shards"]) < num_shards:
        entries = by_all(partial(make, len(manifest["shards"]) + rank()))
        manifest["shards"] += [entry for entry in entries if entry is not None]
        manifest["complete"] = len(manifest["shards"]) == num_shards
        by_the_first(partial(write_manifest, folder, manifest))
        done(len(manifest["shards"]))
