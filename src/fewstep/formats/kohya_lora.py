"""LoRA files in the two layouts tools exchange: kohya's keys, and PEFT's as diffusers writes them."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.casting import cast_weights

KOHYA = "lora_unet_"
_KOHYA_PARTS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}
_PEFT_PARTS = {".lora_A.weight": "down", ".lora_B.weight": "up", ".alpha": "alpha"}
_PEFT_PREFIXES = ("base_model.model.", "unet.", "transformer.")
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
    save_file(tensors, path, metadata={**metadata, "ss_network_module": "networks.lora", **numbers})


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
    save_file(cast_weights(named, dtype), path, metadata=dict(metadata))


def read_lora(path: str | Path, modules: Iterable[str]) -> LoraWeights:
    """Read a LoRA in kohya's or PEFT's layout for a network with these modules.

    Layers of other rank or alpha than the most frequent ones are padded with zeros and rescaled, so that one rank and
    alpha hold for all while every layer's update stays the same.

    Args:
        path: a .safetensors file.
        modules: names of the network's modules (`named_modules`), with or without "network." before them; kohya's
            underscored names are ambiguous without them.

    Returns:
        The LoRA under the names of `modules`, float32.

    Raises:
        UserError: not a readable LoRA; keys of another kind or of layers the network does not have (names some).
    """
    path = Path(path).expanduser()
    tensors, header = _read_safetensors(path)
    kohya = any(key.startswith("lora_") for key in tensors)
    table = _kohya_table(modules) if kohya else {name.removeprefix(_NETWORK): [name] for name in modules}
    layers: dict[str, dict[str, Tensor]] = {}
    strange, foreign = [], []
    for key, value in tensors.items():
        found = _kohya_part(key) if kohya else _peft_part(key)
        if found is None:
            strange.append(key)
        elif len(table.get(found[0], [])) != 1:
            foreign.append(key)
        else:
            layers.setdefault(table[found[0]][0], {})[found[1]] = value.float()
    if strange:
        raise UserError(
            f"{path}: {len(strange)} of its {len(tensors)} keys belong to no plain LoRA of an image network, e.g. "
            f"{strange[:2]} (text encoder LoRA, LoHa, LoKr and DoRA are not supported)"
        )
    if foreign:
        raise UserError(
            f"{path} is a LoRA for another base: {len(foreign)} of its {len(tensors)} keys name layers that this "
            f"network does not have, e.g. {foreign[:2]}"
        )
    broken = [name for name, parts in layers.items() if not {"down", "up"} <= set(parts)]
    if broken or not layers:
        raise UserError(f"{path} is no complete LoRA: layers without both matrices, e.g. {broken[:2]}")
    return _uniform(layers, _header_alpha(path, header))


def read_kohya_lora(path: str | Path, modules: Iterable[str]) -> LoraWeights:
    """As `read_lora`, for kohya's layout only: the inverse of `write_kohya_lora`.

    Raises:
        UserError: as `read_lora`, and for a file in another layout.
    """
    tensors, _ = _read_safetensors(Path(path).expanduser())
    wrong = [key for key in tensors if not key.startswith("lora_")]
    if wrong:
        raise UserError(f"{path} has no kohya keys ({KOHYA}...): e.g. {wrong[:2]}")
    return read_lora(path, modules)


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


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as a LoRA (.safetensors): {error}") from error


def _kohya_table(modules: Iterable[str]) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for name in modules:
        table.setdefault(name.removeprefix(_NETWORK).replace(".", "_"), []).append(name)
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: what it says about alpha is damaged ({error})") from error
    return None


def _uniform(layers: dict[str, dict[str, Tensor]], header_alpha: float | None) -> LoraWeights:
    """One rank and alpha for all layers."""
    ranks = {name: len(parts["down"]) for name, parts in layers.items()}
    alphas = {
        name: float(parts["alpha"]) if "alpha" in parts else header_alpha or float(ranks[name])
        for name, parts in layers.items()
    }
    rank, alpha = max(ranks.values()), Counter(alphas.values()).most_common(1)[0][0]
    state: dict[str, Tensor] = {}
    for name, parts in layers.items():
        down, up = parts["down"], parts["up"]
        factor = (alphas[name] / ranks[name]) / (alpha / rank)
        if ranks[name] < rank:
            missing = rank - ranks[name]
            down = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
            up = torch.cat([up, up.new_zeros(len(up), missing, *up.shape[2:])], 1)
        state[f"{name}.lora_A.weight"] = down
        state[f"{name}.lora_B.weight"] = up if factor == 1 else up * factor
    return LoraWeights(rank, alpha, state)
