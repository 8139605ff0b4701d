"""Checkpoints that many processes write together: torch.distributed.checkpoint with safetensors files, one of each process.

Nothing is unpickled: each file says in its header which part of which tensor it has. Any number of processes reads them,
each its own parts; one process reads them whole, and many read the single file that one process wrote.
"""

import json
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError, first_line
from fewstep.formats.atomic import written_aside
from fewstep.formats.fingerprints import file_digest, json_digest
from fewstep.parallel import agreed, gathered, rank
from fewstep.shared_work import by_the_first


def proven_state(state: Mapping[str, Any]) -> str:
    """The text of `state.json`, with a digest of itself."""
    return json.dumps({**state, "state": json_digest(state)}, indent=1)


def write_parts(target: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], group: Any) -> None:
    """Write a checkpoint folder by all processes together; complete or absent.

    Args:
        tensors: sharded or whole, on the CPU; of whole ones one process writes each.
        state: of the run; digests of the files and the tensors' names are added.
        group: over which the processes agree, which training does not use at the same time.

    Raises:
        UserError: a process could not write; it is named, on all.
    """
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, save

    with ExitStack() as folder:
        place = by_the_first(lambda: str(folder.enter_context(written_aside(target))), group)
        aside = Path(agreed(place or "", group))
        writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
        try:
            save(dict(tensors), storage_writer=writer, process_group=group)
        except CheckpointException as error:
            number, (fault, _) = next(iter(error.failures.items()))
            raise UserError(
                f"process {number} cannot write {target}: {first_line(fault)}; nothing was left half-written. Free some space "
                "or choose another folder, then repeat the command"
            ) from None
        own = {path.name: file_digest(path) for path in aside.glob(f"shard-{rank() + 1:05d}-*")}
        proof = {
            "files": {name: digest for files in gathered(own, group) for name, digest in files.items()},
            "tensors": sorted(tensors),
        }

        def end() -> None:
            (aside / "state.json").write_text(proven_state({**state, **proof}), encoding="utf-8")
            folder.close()

        by_the_first(end, group)


def read_parts(path: Path, like: Mapping[str, Tensor], only: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """The tensors of a checkpoint folder whose names begin so, each as the one of its name in `like` lies in the processes, or whole.

    Raises:
        OSError, KeyError, ValueError and others: a file is missing or damaged.
    """
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load

    reader = HuggingFaceStorageReader(str(path))
    tensors = {}
    metadata: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    for name, found in metadata.items():
        if not name.startswith(only):
            continue
        own = like.get(name)
        if own is not None and own.shape == found.size:
            tensors[name] = torch.empty_like(own, dtype=found.properties.dtype, requires_grad=False)
        else:
            tensors[name] = torch.empty(found.size, dtype=found.properties.dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise ValueError(str(next(iter(error.failures.values()))[0])) from None
    return tensors
