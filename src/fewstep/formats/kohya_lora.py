"""LoRA files in the two layouts tools exchange: kohya's keys, and PEFT's as diffusers writes them."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.casting import cast_weights
from fewstep.formats.ldm_keys import ldm_layers
from fewstep.formats.tensor_files import first_line, read_safetensors, write_tensor_file

KOHYA = "lora_unet_"
_KOHYA_PARTS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}
_PEFT_PARTS = {".lora_A.weight": "down", ".lora_B.weight": "up", ".alpha": "alpha"}
_PEFT_PREFIXES = ("base_model.model.", "unet.", "transformer.")
_MAX_SHOWN = 200  # characters of a key in a message
_MAX_GROWTH = 64  # of a file whose layers are padded to one rank; honest files stay far below
_NETWORK = "network."  # where a Denoiser keeps its diffusers network


@dataclass(frozen=True)
class LoraWeights:
    """One LoRA: the update of layer l is alpha / rank * up_l @ down_l.

    Attributes:
        rank, alpha: of every layer.
        state: as `AdapterRole.adapter_state` names and `load_adapter_state` takes them.
    """

    rank: int
    alpha: float
    state: dict[str, Tensor]

    @property
    def targets(self) -> tuple[str, ...]:
        """The layers, in full, as `LoraShape.targets` takes them."""
        return tuple(name.removesuffix(".lora_A.weight") for name in self.state if name.endswith(".lora_A.weight"))


def write_kohya_lora(
    path: Path, lora: LoraWeights, metadata: Mapping[str, str], dtype: torch.dtype = torch.float32
) -> None:
    """Write `lora_unet_<layer with _>.lora_down.weight / .lora_up.weight / .alpha`; alpha stays float32.

    Raises:
        UserError: a value becomes infinite in `dtype`.
    """
    weights = cast_weights(lora.state, dtype)
    tensors: dict[str, Tensor] = {}
    for target in lora.targets:
        name = KOHYA + target.removeprefix(_NETWORK).replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = weights[f"{target}.lora_A.weight"]
        tensors[f"{name}.lora_up.weight"] = weights[f"{target}.lora_B.weight"]
        tensors[f"{name}.alpha"] = torch.tensor(float(lora.alpha))
    numbers = {"ss_network_dim": str(lora.rank), "ss_network_alpha": str(lora.alpha)}
    write_tensor_file(path, tensors, {**metadata, "ss_network_module": "networks.lora", **numbers})


def write_peft_lora(
    path: Path, lora: LoraWeights, component: str, metadata: Mapping[str, str], dtype: torch.dtype = torch.float32
) -> None:
    """Write `<component>.<layer>.lora_A.weight / .lora_B.weight` with alpha / rank multiplied into lora_B.

    The layout has no place for alpha that every version of diffusers reads, and without one all take alpha = rank.

    Args:
        component: "unet" or "transformer".

    Raises:
        UserError: a value becomes infinite in `dtype`.
    """
    scaled = _scaled(lora, lora.rank)
    named = {f"{component}.{name.removeprefix(_NETWORK)}": value for name, value in scaled.state.items()}
    write_tensor_file(path, cast_weights(named, dtype), metadata)


def read_lora(path: str | Path, modules: Iterable[str], unet_config: Mapping[str, Any] | None = None) -> LoraWeights:
    """Read a LoRA in kohya's or PEFT's layout for a network with these modules.

    kohya's trainer names the blocks of SDXL as the original code does (`lora_unet_input_blocks_4_1_...`) and those of
    Stable Diffusion 1.x and 2.x as diffusers does (`lora_unet_down_blocks_...`); both are read for every U-Net.

    Layers of other rank or alpha than the most frequent ones are padded with zeros and rescaled, so that one rank and
    alpha hold for all while every layer's update stays the same.

    Args:
        path: a .safetensors file.
        modules: names of the network's modules (`named_modules`), with or without "network." before them; kohya's
            underscored names are ambiguous without them.
        unet_config: the U-Net's diffusers config; without it, only diffusers' block names are known.

    Returns:
        The LoRA under the names of `modules`, float32.

    Raises:
        UserError: not a readable LoRA; keys of another kind or of layers the network does not have (names some); two
            keys for one matrix; shapes or an alpha that no LoRA has.
    """
    path = Path(path).expanduser()
    tensors, header = read_safetensors(path)
    kohya = any(key.startswith("lora_") for key in tensors)
    table = _kohya_table(modules, unet_config) if kohya else {name.removeprefix(_NETWORK): [name] for name in modules}
    layers: dict[str, dict[str, Tensor]] = {}
    strange, foreign, twice = [], [], []
    for key, value in tensors.items():
        found = _kohya_part(key) if kohya else _peft_part(key)
        if found is None:
            strange.append(key)
        elif len(names := table.get(found[0], [])) != 1:
            foreign.append(key)
        elif found[1] in layers.setdefault(names[0], {}):
            twice.append(key)
        else:
            layers[names[0]][found[1]] = value
    if strange:
        raise UserError(
            f"{path}: {len(strange)} of its {len(tensors)} keys belong to no plain LoRA of an image network, e.g. "
            f"{_shown(strange)} (text encoder LoRA, LoHa, LoKr and DoRA are not supported)"
        )
    if foreign:
        raise UserError(
            f"{path} is a LoRA for another base: {len(foreign)} of its {len(tensors)} keys name layers that this "
            f"network does not have, e.g. {_shown(foreign)}"
        )
    if twice:
        raise UserError(f"{path} has two keys for one matrix, e.g. {_shown(twice)}; it is damaged or two LoRAs in one")
    broken = [name for name, parts in layers.items() if not {"down", "up"} <= set(parts)]
    if broken or not layers:
        raise UserError(f"{path} is no complete LoRA: layers without both matrices, e.g. {broken[:2]}")
    if misshapen := [name for name, parts in layers.items() if not _is_lora_layer(parts)]:
        raise UserError(f"{path} is damaged: what it has of the layer {misshapen[0]} is no LoRA's")
    try:
        return _uniform(layers, _header_alpha(path, header))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def lora_from_state(state: Mapping[str, Tensor], rank: int, alpha: float) -> LoraWeights:
    """A LoRA from `AdapterRole.adapter_state` and its shape."""
    return LoraWeights(rank, alpha, {name: value.detach().cpu() for name, value in state.items()})


def rescaled_state(lora: LoraWeights, alpha: float) -> dict[str, Tensor]:
    """The state of the same LoRA for a role of the same rank and another alpha."""
    return _scaled(lora, alpha).state


def _scaled(lora: LoraWeights, alpha: float) -> LoraWeights:
    factor = lora.alpha / alpha
    state = {name: value * factor if name.endswith(".lora_B.weight") else value for name, value in lora.state.items()}
    return LoraWeights(lora.rank, alpha, state)


def _kohya_table(modules: Iterable[str], unet_config: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """{a layer's name with underscores, in diffusers' and in LDM's words: the modules it can mean}."""
    full = {name.removeprefix(_NETWORK): name for name in modules}
    aliases = ldm_layers(full, unet_config) if unet_config else {}
    table: dict[str, list[str]] = {}
    for words, name in [*((name, name) for name in full), *aliases.items()]:
        table.setdefault(words.replace(".", "_"), []).append(full[name])
    return table


def _kohya_part(key: str) -> tuple[str, str] | None:
    layer, _, part = key.partition(".")
    known = layer.startswith(KOHYA) and part in _KOHYA_PARTS
    return (layer.removeprefix(KOHYA), _KOHYA_PARTS[part]) if known else None


def _peft_part(key: str) -> tuple[str, str] | None:
    for prefix in _PEFT_PREFIXES:
        key = key.removeprefix(prefix)
    for suffix, part in _PEFT_PARTS.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), part
    return None


def _shown(keys: list[str]) -> list[str]:
    """Two keys as messages show them: a damaged file's may be endless."""
    return [key[:_MAX_SHOWN] for key in keys[:2]]


def _is_lora_layer(parts: dict[str, Tensor]) -> bool:
    """Whether down (rank, in, ...), up (out, rank, ...) and alpha, if there, can be one layer's."""
    down, up, alpha = parts["down"], parts["up"], parts.get("alpha", torch.ones(()))
    if any(value.is_complex() for value in parts.values()):
        return False
    fits = down.ndim == up.ndim and down.ndim in (2, 4) and down.numel() and up.numel() and len(down) == up.shape[1]
    return bool(fits) and up.shape[2:].numel() == 1 and alpha.numel() == 1


def _header_alpha(path: Path, header: dict[str, str]) -> float | None:
    """Alpha of PEFT files: in our own header, in diffusers', or in PEFT's config beside the file; None: rank."""
    try:
        if "lora" in header:
            return float(json.loads(header["lora"])["alpha"])
        if "lora_adapter_metadata" in header:
            values: dict[str, Any] = json.loads(header["lora_adapter_metadata"])
            return next((float(value) for name, value in values.items() if name.endswith("lora_alpha")), None)
        config = path.parent / "adapter_config.json"
        if config.is_file():
            return float(json.loads(config.read_text(encoding="utf-8"))["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: what it says about alpha is damaged ({first_line(error)})") from error
    return None


def _uniform(layers: dict[str, dict[str, Tensor]], header_alpha: float | None) -> LoraWeights:
    """One rank and alpha for all layers, float32; raises ValueError where no number serves as alpha."""
    ranks = {name: len(parts["down"]) for name, parts in layers.items()}
    alphas = {
        name: float(parts["alpha"]) if "alpha" in parts else header_alpha or float(ranks[name])
        for name, parts in layers.items()
    }
    if wrong := [name for name, value in alphas.items() if not value or not math.isfinite(value)]:
        raise ValueError(f"alpha of the layer {wrong[0]} is {alphas[wrong[0]]}")
    rank, alpha = max(ranks.values()), Counter(alphas.values()).most_common(1)[0][0]
    sizes = {name: parts["down"].numel() + parts["up"].numel() for name, parts in layers.items()}
    if sum(size // ranks[name] for name, size in sizes.items()) * rank > _MAX_GROWTH * sum(sizes.values()):
        raise ValueError(f"one layer has rank {rank}, most others less than a {_MAX_GROWTH}th of it")
    state: dict[str, Tensor] = {}
    for name, parts in layers.items():
        down, up = parts["down"].float(), parts["up"].float()
        factor = (alphas[name] / ranks[name]) / (alpha / rank)
        if ranks[name] < rank:
            missing = rank - ranks[name]
            down = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
            up = torch.cat([up, up.new_zeros(len(up), missing, *up.shape[2:])], 1)
        state[f"{name}.lora_A.weight"] = down
        state[f"{name}.lora_B.weight"] = up if factor == 1 else up * factor
    return LoraWeights(rank, alpha, state)
