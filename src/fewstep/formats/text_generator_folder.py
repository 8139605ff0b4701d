"""A trained text-to-image generator on disk: its own weights (a network or a LoRA) in diffusers' names, and its card."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.atomic import written_aside
from fewstep.formats.model_folder import CARD, ModelCard
from fewstep.formats.tensor_files import write_tensor_file

ADAPTER = "adapter.safetensors"  # alpha / rank is not multiplied in: not for diffusers to load as it is
LORA = "pytorch_lora_weights.safetensors"  # an exported LoRA, with alpha multiplied in
NETWORK = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"


def write_generator_folder(
    folder: Path, description: dict[str, Any], weights: dict[str, Tensor], card: ModelCard,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Write `unet/` (or `transformer/`), or one LoRA file, and the card; the folder appears whole or not at all.

    Args:
        description: as `Denoiser.describe` gives it; with a "lora" entry the weights are an adapter's.
        weights: the network's own state dict, or `AdapterRole.adapter_state`.
        card: role, step schedule, base.
    """
    header = {"format": "pt", "role": card.role, "step_indices": json.dumps(list(card.step_indices)), "base": card.base}
    tensors = {name: value.detach().to(dtype).cpu().contiguous() for name, value in weights.items()}
    with written_aside(folder) as aside:
        part = _component(description)
        if "lora" in description:
            prefix = "transformer" if part == "transformer" else "unet"
            named = {f"{prefix}.{name.removeprefix('network.')}": value for name, value in tensors.items()}
            write_tensor_file(aside / ADAPTER, named, {**header, "lora": json.dumps(description["lora"])})
        else:
            (aside / part).mkdir()
            write_tensor_file(aside / part / NETWORK, tensors, header)
            kind = "SD3Transformer2DModel" if part == "transformer" else "UNet2DConditionModel"
            config = {"_class_name": kind, **description["network"]}
            (aside / part / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
        values = {**asdict(card), "description": description}
        (aside / CARD).write_text(json.dumps(values, indent=1), encoding="utf-8")


def is_generator_folder(folder: Path) -> bool:
    """Whether a folder was written by `write_generator_folder`."""
    try:
        return "description" in json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def read_generator_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], ModelCard]:
    """Inverse of `write_generator_folder`: (description, weights, card).

    Raises:
        UserError: a file is missing or damaged; names it.
    """
    try:
        values = json.loads((folder / CARD).read_text(encoding="utf-8"))
        description = dict(values.pop("description"))
        for name in ("step_indices", "class_names"):
            values[name] = tuple(values[name])
        card = ModelCard(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CARD} is missing or damaged ({error}); export the generator again") from error
    part = _component(description)
    path = folder / part / NETWORK
    if "lora" in description:
        path = folder / (ADAPTER if (folder / ADAPTER).is_file() else LORA)
    try:
        weights = {name: value.float() for name, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy or export the generator again") from error
    if "lora" in description:
        weights = {f"network.{name.split('.', 1)[1]}": value for name, value in weights.items()}
    return description, weights, card


def _component(description: dict[str, Any]) -> str:
    return "transformer" if description["family"] == "sd3" else "unet"
