"""A trained text-to-image generator on disk: its own weights (a network or a LoRA) in diffusers' names, and its card."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.atomic import written_aside
from fewstep.formats.json_files import entry, read_json_object
from fewstep.formats.model_folder import CARD, ModelCard, card_from_json
from fewstep.formats.tensor_files import itself, refuse_infinities, write_tensor_file

ADAPTER = "adapter.safetensors"  # alpha / rank is not multiplied in: not for diffusers to load as it is
LORA = "pytorch_lora_weights.safetensors"  # an exported LoRA, with alpha multiplied in
NETWORK = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
_REMEDY = "export the generator again"


class NetworkPart(NamedTuple):
    """A network in a diffusers folder: the component's name ("unet", "transformer") and its class."""

    component: str
    class_name: str


def write_generator_folder(
    folder: Path, description: dict[str, Any], weights: dict[str, Tensor], card: ModelCard,
    network: NetworkPart, dtype: torch.dtype = torch.float32, whole: Callable[[Tensor], Tensor] = itself,
) -> None:  # fmt: skip
    """Write the network's own folder, or one LoRA file, and the card; the folder appears whole or not at all.

    Args:
        description: as `Denoiser.describe` gives it; with a "lora" entry the weights are an adapter's.
        weights: the network's own state dict, or `AdapterRole.adapter_state`.
        card: role, step schedule, base.
        network: what diffusers calls it.
        whole: as `write_tensor_file` has it.
    """
    header = {"format": "pt", "role": card.role, "step_indices": json.dumps(list(card.step_indices)), "base": card.base}
    with written_aside(folder) as aside:
        if "lora" in description:
            named = {f"{network.component}.{name.removeprefix('network.')}": value for name, value in weights.items()}
            entries = {**header, "lora": json.dumps(description["lora"])}
            write_tensor_file(aside / ADAPTER, named, entries, dtype=dtype, whole=whole)
        else:
            (aside / network.component).mkdir()
            write_tensor_file(aside / network.component / NETWORK, weights, header, dtype=dtype, whole=whole)
            config = {"_class_name": network.class_name, **description["network"]}
            (aside / network.component / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
        values = {**asdict(card), "description": description}
        (aside / CARD).write_text(json.dumps(values, indent=1), encoding="utf-8")


def is_generator_folder(folder: Path) -> bool:
    """Whether a folder was written by `write_generator_folder`."""
    try:
        return "description" in json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def read_generator_folder(
    folder: Path, component_of: Callable[[dict[str, Any]], str]
) -> tuple[dict[str, Any], dict[str, Tensor], ModelCard]:
    """Inverse of `write_generator_folder`: (description, weights, card).

    Args:
        component_of: what diffusers calls the network of a description; raises ValueError for one it does not know.

    Raises:
        UserError: a file is missing or damaged, or the description is of no known kind; names it.
    """
    values = read_json_object(folder / CARD, _REMEDY)
    description = entry(values, "description", dict, folder / CARD, _REMEDY)
    card = card_from_json({name: value for name, value in values.items() if name != "description"}, folder / CARD)
    _check_description(description, folder / CARD)
    try:
        path = folder / component_of(description) / NETWORK
    except ValueError as error:
        raise UserError(f"{folder / CARD}: {error}") from error
    if "lora" in description:
        path = folder / (ADAPTER if (folder / ADAPTER).is_file() else LORA)
    try:
        weights = {name: value.float() for name, value in load_file(path).items()}
    except Exception as error:  # a damaged file ends in any kind; all mean the same to a user
        raise UserError(f"{path} cannot be read ({error}); copy or export the generator again") from error
    refuse_infinities(weights, str(path))
    if "lora" in description:
        weights = {f"network.{name.partition('.')[2]}": value for name, value in weights.items()}
    return description, weights, card


def _check_description(description: dict[str, Any], path: Path) -> None:
    """Raise UserError where what every text-to-image description has is missing or of another kind."""
    for name, kind in {"family": str, "network": dict, "scheduler": dict, "latent_size": int}.items():
        entry(description, name, kind, path, _REMEDY)
    if "lora" in description:
        lora = entry(description, "lora", dict, path, _REMEDY)
        for name, kinds in {"rank": int, "alpha": (int, float), "targets": list}.items():
            entry(lora, name, kinds, path, _REMEDY)  # type: ignore[arg-type]
        if not all(isinstance(target, str) for target in lora["targets"]):
            raise UserError(f"{path} is damaged: lora.targets are not all texts; {_REMEDY}")
