"""Checkpoints that are complete or absent, hold everything an exact continuation needs, and load without unpickling.

One checkpoint is a folder `step_NNNNNNNN/` with `tensors.safetensors` and `state.json`. It is written aside under
a dotted name, flushed to disk and renamed; a reader never sees half of one.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.distillation.sharding import put_weights
from fewstep.errors import UserError
from fewstep.formats.atomic import written_aside
from fewstep.formats.compare import state_difference
from fewstep.formats.fingerprints import file_digest, json_digest
from fewstep.formats.tensor_files import write_tensor_file
from fewstep.networks.adapters import AdapterRole
from fewstep.parallel import gathered, rank, world_size
from fewstep.training.sharded_checkpoint import proven_state, read_parts

TENSORS = "tensors.safetensors"
_PREFIX, _MOST_SECONDS = "step_", 1e12
_NAME = re.compile(r"step_\d{8,}")


def write_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` finished steps below `folder`, then drop all but the newest `keep`.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are untouched and nothing is left behind.
    """
    target = checkpoint_path(folder, step)
    with written_aside(target) as aside:
        write_tensor_file(aside / TENSORS, {name: tensor.detach().contiguous() for name, tensor in tensors.items()})
        proof = {"files": {TENSORS: file_digest(aside / TENSORS)}, "tensors": sorted(tensors)}
        (aside / "state.json").write_text(proven_state({**state, "step": step, **proof}), encoding="utf-8")
    drop_older(folder, keep)
    return target


def drop_older(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; one too many does no harm."""
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` finished steps lies."""
    return folder / f"{_PREFIX}{step:08d}"


def checkpoint_step(path: Path) -> int:
    """How many steps were finished in a checkpoint of `list_checkpoints`."""
    return int(path.name.removeprefix(_PREFIX))


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints below `folder`, oldest first; what a user keeps beside them under other names is none."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=checkpoint_step)


def read_checkpoint(
    path: Path, like: Mapping[str, Tensor] | None = None, only: tuple[str, ...] = ("",)
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and JSON state of one checkpoint, proven to be what was written, by any number of processes.

    Args:
        like: tensors of the run by their names: of sharded ones each process reads its own part. All must ask together.
        only: beginnings of the names of the tensors to be read; the files are proven whole all the same.

    Checkpoints of earlier versions have no digests and are taken as they are.

    Raises:
        UserError: a file is missing or damaged; names the checkpoint before it.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise damaged(path, "state.json has another shape")
        if state.pop("state", None) not in (None, json_digest(state)):
            raise damaged(path, "state.json is not what was written")
        files, names = state.pop("files", None), state.pop("tensors", None)
        _prove(path, files, shared=like is not None)
        in_parts = like is not None or TENSORS not in (files or {TENSORS: ""})
        tensors = read_parts(path, like or {}, only) if in_parts else _read_some(path / TENSORS, only)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    if names is not None and [name for name in names if name.startswith(only)] != sorted(tensors):
        raise damaged(path, f"{TENSORS} does not have the tensors that state.json lists")
    return tensors, state


def _read_some(path: Path, only: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of one file whose names begin so."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(only)}  # noqa: SIM118


def _prove(path: Path, files: Any, shared: bool) -> None:
    """Raise UserError where files are not what was written; `shared`: each process reads some of them."""
    names = sorted(files) if isinstance(files, dict) else []
    faults = [
        name
        for name in (names[rank() :: world_size()] if shared else names)
        if not (path / name).is_file() or file_digest(path / name) != files[name]
    ]
    if shared:
        faults = [name for some in gathered(faults) for name in some]
    if faults or (files is not None and not names):
        gone = [name for name in faults if not (path / name).exists()]
        raise damaged(
            path, f"{gone[0]} is missing" if gone else f"{(faults or ['state.json'])[0]} is not what was written"
        )


@dataclass(frozen=True)
class Progress:
    """How far a run was: its phase, finished steps, and seconds of training; and the names of its data's classes, where it noted them."""

    phase: str
    step: int
    seconds: float
    class_names: tuple[str, ...] = ()


def read_progress(path: Path, state: Mapping[str, Any]) -> Progress:
    """What the JSON state of the checkpoint at `path` says of it.

    Raises:
        UserError: it has another shape.
    """
    phase, step, elapsed = state.get("phase"), state.get("step"), state.get("elapsed_seconds")
    names = state.get("class_names", [])  # which earlier versions did not note
    numbers = [value for value in (step, elapsed) if isinstance(value, int | float) and not isinstance(value, bool)]
    if not (isinstance(phase, str) and isinstance(step, int) and len(numbers) == 2 and 0 <= numbers[1] < _MOST_SECONDS):
        raise damaged(path, "state.json has another shape")
    if path.name != checkpoint_path(path.parent, step).name:
        raise damaged(path, f"state.json says that it is of step {step}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise damaged(path, "the class names of state.json are none")
    return Progress(phase, step, float(numbers[1]), tuple(names))


def damaged(path: Path, why: str) -> UserError:
    """The error for a checkpoint that cannot be continued from; offers the one before it."""
    others = [other for other in list_checkpoints(path.parent) if other.name != path.name]
    earlier = [other for other in others if (len(other.name), other.name) < (len(path.name), path.name)]
    offer = f"continue from {earlier[-1].name}, the one before" if earlier else "begin again: there is none before it"
    return UserError(f"checkpoint {path} is damaged ({why}); remove it to {offer}")


def module_tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    """State dict of a module under `name.`."""
    return {f"{name}.{key}": value for key, value in module.state_dict().items()}


def restore_module(name: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Inverse of `module_tensors`; raises UserError when the checkpoint holds another network."""
    prefix = f"{name}."
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if isinstance(module, AdapterRole):
        own = module.renamed(own)
    if fault := state_difference(own, module.state_dict()):
        raise UserError(f"the checkpoint's {name} is another network: {fault}")
    put_weights(module, own)


def random_state() -> dict[str, Tensor]:
    """State of torch's global generators (dropout uses them), as tensors."""
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_random_state(path: Path, tensors: dict[str, Tensor]) -> None:
    """Inverse of `random_state`, from the checkpoint at `path`.

    Raises:
        UserError: the state is missing or damaged.
    """
    try:
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise damaged(path, f"its random state: {type(error).__name__}: {error}") from error
