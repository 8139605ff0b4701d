"""Text-to-image generators as LoRA files for diffusers and for kohya's readers, or fused into their base."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.formats.kohya_lora import LoraWeights, lora_from_state, write_kohya_lora, write_peft_lora
from fewstep.formats.model_folder import CARD
from fewstep.formats.text_generator_folder import LORA
from fewstep.models.model import Model
from fewstep.networks.adapters import AdapterRole


def base_denoiser(generator: Model) -> DiffusersDenoiser:
    """The generator's network, or the one its LoRA sits on."""
    base = generator.denoiser.base_network
    assert isinstance(base, DiffusersDenoiser)
    return base


def component_name(generator: Model) -> str:
    """What diffusers calls the network: "unet" or "transformer"."""
    return generator.family.component


@torch.no_grad()
def fused_weights(generator: Model) -> dict[str, Tensor]:
    """State dict of the whole network under diffusers' keys; a LoRA is added to its base's weights."""
    base, denoiser = base_denoiser(generator), generator.denoiser
    if not isinstance(denoiser, AdapterRole):
        return dict(base.network.state_dict())
    weights = {
        name.replace(".base_layer.", "."): value
        for name, value in base.network.state_dict().items()
        if ".lora_" not in name
    }
    for path, layer in denoiser.shared.layers.items():
        name = f"{path.removeprefix('network.')}.weight"
        wrapped: Any = layer
        update = wrapped.delta_weight(denoiser.role)
        weights[name] = weights[name] + update.to(weights[name])
    return weights


def lora_weights(generator: Model) -> LoraWeights:
    """The generator's LoRA.

    Raises:
        UserError: the generator is a whole network.
    """
    denoiser = generator.denoiser
    if not isinstance(denoiser, AdapterRole):
        raise UserError(
            "this generator is a whole network, not a LoRA on its base: there is no low-rank update to export; choose "
            "--as diffusers, unet or single-file, or train with memory.mode='lora_generator'"
        )
    lora = denoiser.shared.lora
    return lora_from_state(denoiser.adapter_state(), lora.rank, lora.alpha)


def export_lora(folder: Path, generator: Model, name: str, dtype: torch.dtype, header: Mapping[str, str]) -> None:
    """`pytorch_lora_weights.safetensors`, which `pipe.load_lora_weights(folder)` takes, and `fewstep.json`."""
    lora = lora_weights(generator)
    write_peft_lora(folder / LORA, lora, component_name(generator), header, dtype)
    description = generator.denoiser.describe()
    description["lora"] = {**description["lora"], "alpha": float(lora.rank)}  # the file's, multiplied in
    values = {**asdict(generator.card), "description": description}
    (folder / CARD).write_text(json.dumps(values, indent=1), encoding="utf-8")


def export_kohya_lora(folder: Path, generator: Model, name: str, dtype: torch.dtype, header: Mapping[str, str]) -> None:
    """`<name>.safetensors` with kohya's keys.

    Raises:
        UserError: kohya's layout has names of its own for the layers of this family.
    """
    family, network = generator.family, base_denoiser(generator).network
    if not family.kohya_names:
        raise UserError(
            f"kohya keys are not written for {family.title}, whose layers have other names there; export the LoRA "
            "with --as lora"
        )
    lora, original = lora_weights(generator), None
    if family.kohya_names == "original":
        modules = [module.replace(".base_layer", "") for module, _ in network.named_modules()]
        original = family.layer_aliases(generator.denoiser.describe(), modules)
    write_kohya_lora(folder / f"{name}.safetensors", lora, header, dtype, original)
