"""Checkpoints that are complete or absent, hold everything an exact continuation needs, and load without unpickling.

One checkpoint is a folder `step_NNNNNNNN/` with `tensors.safetensors` and `state.json`. It is written aside under
a dotted name, flushed to disk and renamed; a reader never sees half of one.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.formats.atomic import written_aside
from fewstep.formats.compare import state_difference

_PREFIX = "step_"


def write_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` finished steps below `folder`, then drop all but the newest `keep`.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are untouched and nothing is left behind.
    """
    target = folder / f"{_PREFIX}{step:08d}"
    with written_aside(target) as aside:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, aside / "tensors.safetensors"
        )
        (aside / "state.json").write_text(json.dumps({**state, "step": step}, indent=1), encoding="utf-8")
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints below `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.startswith(_PREFIX))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and JSON state of one checkpoint.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return load_file(path / "tensors.safetensors"), state
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({error}); remove it to continue from the one before"
        ) from error


def module_tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    """State dict of a module under `name.`."""
    return {f"{name}.{key}": value for key, value in module.state_dict().items()}


def restore_module(name: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Inverse of `module_tensors`; raises UserError when the checkpoint holds another network."""
    prefix = f"{name}."
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if fault := state_difference(own, module.state_dict()):
        raise UserError(f"the checkpoint's {name} is another network: {fault}")
    module.load_state_dict(own)


def random_state() -> dict[str, Tensor]:
    """State of torch's global generators (dropout uses them), as tensors."""
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_random_state(tensors: dict[str, Tensor]) -> None:
    """Inverse of `random_state`."""
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
