"""A model on disk: a diffusers-style folder whose weights are safetensors and whose schedule travels with them."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.atomic import written_aside
from fewstep.formats.tensor_files import write_tensor_file

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CONFIG = "unet/config.json"
CARD = "fewstep.json"


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model besides its weights.

    Attributes:
        role: "teacher" or "generator".
        step_indices: grid indices a generator runs at; empty for a teacher.
        num_levels: length of the grid the indices refer to.
        class_names: names of the classes, empty where unknown.
        can_be_guided: whether the model was trained without its condition part of the time.
        made_with: resolved settings, steps and library version of the run that made it.
        licence: of the weights.
        base: model that the remaining components of a text-to-image generator are read from.
    """

    role: str
    step_indices: tuple[int, ...] = ()
    num_levels: int = 1000
    class_names: tuple[str, ...] = ()
    can_be_guided: bool = False
    made_with: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    base: str = ""


def write_model_folder(
    folder: Path, description: dict[str, Any], weights: dict[str, Tensor], card: ModelCard,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Write weights, network description and card; the folder appears whole or not at all.

    Args:
        folder: target; an earlier folder of this name is replaced.
        description: as `Denoiser.describe` gives it.
        weights: state dict; stored as `dtype`.
    """
    with written_aside(folder) as aside:
        (aside / "unet").mkdir()
        tensors = {name: value.detach().to(dtype).cpu().contiguous() for name, value in weights.items()}
        header = {"format": "pt", "role": card.role, "step_indices": json.dumps(list(card.step_indices))}
        write_tensor_file(aside / WEIGHTS, tensors, header)
        config = {"_class_name": "EDMUNetModel", "description": description}
        (aside / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
        if card.step_indices:
            _write_pipeline_files(aside, card)
        (aside / CARD).write_text(json.dumps(asdict(card), indent=1), encoding="utf-8")


def _write_pipeline_files(folder: Path, card: ModelCard) -> None:
    """What diffusers needs to assemble a pipeline: its index, and the schedule in a scheduler's config."""
    module = "fewstep.export.diffusers_folder"
    index = {
        "_class_name": "FewstepPipeline", "unet": [module, "EDMUNetModel"], "scheduler": [module, "FewstepScheduler"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    config = {
        "_class_name": "FewstepScheduler", "step_indices": list(card.step_indices), "num_levels": card.num_levels,
    }  # fmt: skip
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def read_model_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], ModelCard]:
    """Inverse of `write_model_folder`: (description, float32 weights, card).

    Raises:
        UserError: not a folder of ours, or a damaged file; names it.
    """
    description, card = read_card(folder)
    try:
        weights = {name: value.float() for name, value in load_file(folder / WEIGHTS).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read ({error}); copy or export the model again") from error
    return description, weights, card


def read_card(folder: Path) -> tuple[dict[str, Any], ModelCard]:
    """(description, card) of a folder of ours, without reading its weights.

    Raises:
        UserError: not a folder of ours, or a damaged file; names it.
    """
    for name in (CONFIG, CARD, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not a fewstep model: {name} is missing")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        values = json.loads((folder / CARD).read_text(encoding="utf-8"))
        values["step_indices"] = tuple(values["step_indices"])
        values["class_names"] = tuple(values["class_names"])
        card = ModelCard(**values)
        description = dict(config["description"])
        if not all(0 <= int(index) < card.num_levels for index in card.step_indices):
            raise ValueError(f"step indices {card.step_indices} outside the grid")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: {CONFIG} or {CARD} is damaged ({error}); export the model again") from error
    return description, card
