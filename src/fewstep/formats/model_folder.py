"""A model on disk: a diffusers-style folder whose weights are safetensors and whose schedule travels with them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.atomic import written_aside
from fewstep.formats.json_files import entry, read_json_object
from fewstep.formats.tensor_files import itself, write_tensor_file

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CONFIG = "unet/config.json"
CARD = "fewstep.json"
_REMEDY = "export the model again"
_MAX_LEVELS = 100_000
_KINDS: dict[str, type] = {
    "role": str, "step_indices": list, "num_levels": int, "step_sigmas": list, "class_names": list, "can_be_guided": bool, "made_with": dict,
    "licence": str, "base": str, "base_loras": list,
}  # fmt: skip


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
        base_loras: LoRAs ("FILE:STRENGTH") that are merged into the base's network, of a teacher into its own.
        step_sigmas: of generators of flow models, the noise level at each index, exact; empty: the teacher's grid says.
    """

    role: str
    step_indices: tuple[int, ...] = ()
    num_levels: int = 1000
    class_names: tuple[str, ...] = ()
    can_be_guided: bool = False
    made_with: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    base: str = ""
    step_sigmas: tuple[float, ...] = ()
    base_loras: tuple[str, ...] = ()


def write_model_folder(
    folder: Path, description: dict[str, Any], weights: dict[str, Tensor], card: ModelCard,
    dtype: torch.dtype = torch.float32, whole: Callable[[Tensor], Tensor] = itself,
) -> None:  # fmt: skip
    """Write weights, network description and card; the folder appears whole or not at all.

    Args:
        folder: target; an earlier folder of this name is replaced.
        description: as `Denoiser.describe` gives it.
        weights: state dict; stored as `dtype`.
        whole: as `write_tensor_file` has it.
    """
    with written_aside(folder) as aside:
        (aside / "unet").mkdir()
        header = {"format": "pt", "role": card.role, "step_indices": json.dumps(list(card.step_indices))}
        write_tensor_file(aside / WEIGHTS, weights, header, dtype=dtype, whole=whole)
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
    except Exception as error:  # a damaged file ends in any kind; all mean the same to a user
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
    values = read_json_object(folder / CARD, _REMEDY)
    description = entry(read_json_object(folder / CONFIG, _REMEDY), "description", dict, folder / CONFIG, _REMEDY)
    return description, card_from_json(values, folder / CARD)


def card_from_json(values: Mapping[str, Any], path: Path) -> ModelCard:
    """The card of a JSON object, each entry of its kind.

    Raises:
        UserError: an entry is missing, unknown, of another kind, or no step schedule; names file and key.
    """
    if unknown := sorted(set(values) - {part.name for part in fields(ModelCard)}):
        raise UserError(f"{path} is damaged: its entry {unknown[0][:60]!r} is unknown; {_REMEDY}")
    for name, kind in _KINDS.items():
        if name in values or name in ("role", "step_indices", "class_names"):
            entry(values, name, kind, path, _REMEDY)
    lists = {name: tuple(value) for name, value in values.items() if _KINDS[name] is list}
    card = ModelCard(**{**values, **lists})
    if not 0 < card.num_levels <= _MAX_LEVELS:
        raise UserError(f"{path} is damaged: num_levels is {card.num_levels}, not 1 to {_MAX_LEVELS}; {_REMEDY}")
    if not all(type(index) is int and 0 <= index < card.num_levels for index in card.step_indices):
        raise UserError(f"{path} is damaged: step_indices {list(card.step_indices)[:8]} are not in its grid; {_REMEDY}")
    if not (_are_levels(card.step_sigmas) and len(card.step_sigmas) in (0, len(card.step_indices))):
        raise UserError(f"{path} is damaged: step_sigmas {list(card.step_sigmas)[:8]} are no noise levels; {_REMEDY}")
    for name in ("class_names", "base_loras"):
        if not all(isinstance(text, str) for text in getattr(card, name)):
            raise UserError(f"{path} is damaged: {name} are not all texts; {_REMEDY}")
    return card


def _are_levels(sigmas: tuple[Any, ...]) -> bool:
    """Whether they are numbers in (0, 1], noisiest first."""
    numbers = all(type(sigma) in (int, float) and 0 < sigma <= 1 for sigma in sigmas)
    return numbers and list(sigmas) == sorted(set(sigmas), reverse=True)
