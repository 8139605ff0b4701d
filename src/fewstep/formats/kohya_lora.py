"""LoRA files in the layouts tools exchange: kohya's keys, PEFT's as diffusers writes them, and older spellings of both."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.casting import cast_weights
from fewstep.formats.foreign_kinds import foreign_kind
from fewstep.formats.fused_loras import by_original_name, fused, parts_of
from fewstep.formats.lora_scale import LoraScale, read_lora_scale
from fewstep.formats.lora_spellings import (
    KOHYA,
    NETWORK,
    LayerAliases,
    dotted_part,
    is_kohya,
    is_lora_key,
    is_mixed,
    kohya_part,
    layer_table,
    modern_spelling,
    no_aliases,
)
from fewstep.formats.tensor_files import (
    is_safetensors,
    read_safetensors,
    read_tensors,
    refuse_infinities,
    write_tensor_file,
)

_TEXT = "text_encoder"  # what keys with dots of its layers begin with
_MAX_SHOWN = 200  # characters of a key in a message
_MAX_GROWTH = 64  # of a file whose layers are padded to one rank; honest files stay far below


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
    path: Path, lora: LoraWeights, metadata: Mapping[str, str], dtype: torch.dtype = torch.float32,
    original: Mapping[str, str | tuple[str, ...]] | None = None,
) -> None:  # fmt: skip
    """Write `lora_unet_<layer with _>.lora_down.weight / .lora_up.weight / .alpha`; alpha stays float32.

    Args:
        original: {the original code's name of a layer: the modules it stands for, row after row}, where tools use those names;
            several modules become one layer of as many times the rank.

    Raises:
        UserError: a value becomes infinite in `dtype`.
    """
    weights, known = cast_weights(lora.state, dtype), set(lora.targets)
    tensors: dict[str, Tensor] = {}

    def parts(target: str) -> dict[str, Tensor] | None:
        if target not in known:
            return None
        down, up = (weights[f"{target}.lora_{part}.weight"] for part in "AB")
        return {"down": down, "up": up, "alpha": torch.tensor(float(lora.alpha))}

    prefix = NETWORK if any(target.startswith(NETWORK) for target in known) else ""
    names = by_original_name([target.removeprefix(prefix) for target in lora.targets], original or {})
    for words, modules in names.items():
        layers = [parts(prefix + module) for module in modules]
        layer, name = layers[0] if len(layers) == 1 else fused(layers), KOHYA + words.replace(".", "_")
        assert layer is not None
        tensors[f"{name}.lora_down.weight"] = layer["down"]
        tensors[f"{name}.lora_up.weight"] = layer["up"]
        tensors[f"{name}.alpha"] = layer["alpha"]
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
    named = {f"{component}.{name.removeprefix(NETWORK)}": value for name, value in scaled.state.items()}
    write_tensor_file(path, cast_weights(named, dtype), metadata)


def read_lora(path: str | Path, modules: Iterable[str], aliases: LayerAliases = no_aliases) -> LoraWeights:
    """Read a LoRA in kohya's, PEFT's or one of diffusers' older layouts for a network with these modules.

    kohya's trainer names the blocks of some models as their original code does (`lora_unet_input_blocks_4_1_...`) and
    those of others as diffusers does (`lora_unet_down_blocks_...`); with `aliases`, both are read for every model, also where
    a layer of the original code stands for several.

    Layers of other rank or alpha than the most frequent ones are padded with zeros and rescaled, so that one rank and
    alpha hold for all while every layer's update stays the same.

    Args:
        path: a .safetensors file, or one that torch saved.
        modules: names of the network's modules (`named_modules`), with or without "network." before them; kohya's
            underscored names are ambiguous without them.
        aliases: the layers' names in the original code, as the family says them.

    Returns:
        The LoRA under the names of `modules`, float32.

    Raises:
        UserError: not a readable LoRA; keys of another kind or of layers the network does not have (names some); two
            keys for one matrix; shapes or an alpha that no LoRA has.
    """
    path = Path(path).expanduser()
    tensors, header = read_safetensors(path) if is_safetensors(path) else (read_tensors(path), {})
    kohya = _is_kohya(path, tensors)
    table = layer_table(modules, aliases, "_" if kohya else ".")
    spelled = {key: [(key, value)] for key, value in tensors.items()} if kohya else modern_spelling(tensors)
    layers: dict[tuple[str, ...], dict[str, Tensor]] = {}
    strange, foreign, twice = [], [], []
    for name, ((key, value), *more) in spelled.items():
        found = kohya_part(name) if kohya else dotted_part(name)
        if found is None or name.startswith(_TEXT):
            strange.append(key)
        elif len(names := table.get(found[0], [])) != 1:
            foreign.append(key)
        elif more or found[1] in layers.setdefault(names[0], {}):
            twice.append(key)
        else:
            layers[names[0]][found[1]] = value
    if strange:
        kind = foreign_kind(strange) or "text encoder LoRA, LoHa, LoKr and DoRA"
        raise UserError(
            f"{path}: {len(strange)} of its {len(tensors)} keys belong to no plain LoRA of an image network, e.g. "
            f"{_shown(strange)} ({kind}: not supported)"
        )
    if foreign:
        raise UserError(
            f"{path} is a LoRA for another base: {len(foreign)} of its {len(tensors)} keys name layers that this "
            f"network does not have, e.g. {_shown(foreign)}"
        )
    if twice:
        raise UserError(f"{path} has two keys for one matrix, e.g. {_shown(twice)}; it is damaged or two LoRAs in one")
    single = _taken_apart(layers, path)
    refuse_infinities({key: value for key, value in tensors.items() if value.numel() > 1}, str(path))
    scale = read_lora_scale(path, header, kohya)
    try:
        return _uniform(single, scale)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _is_kohya(path: Path, keys: Iterable[str]) -> bool:
    """Whether a LoRA is in kohya's spelling; raises UserError for one in several."""
    known = [key for key in keys if is_lora_key(key)]
    if not is_kohya(known):
        return False
    if is_mixed(known):
        raise UserError(f"{path} mixes kohya's spelling (lora_unet_...) and others in one file; save it in one of them")
    return True


def _taken_apart(layers: Mapping[tuple[str, ...], dict[str, Tensor]], path: Path) -> dict[str, dict[str, Tensor]]:
    """Parts of each module, where a layer of the file may stand for several; raises UserError for what no LoRA has."""
    _refuse_broken({" + ".join(names): parts for names, parts in layers.items()}, path)
    single: dict[str, dict[str, Tensor]] = {}
    for names, parts in layers.items():
        try:
            each = [parts] if len(names) == 1 else parts_of(parts, len(names))
        except ValueError as error:
            raise UserError(f"{path} is damaged: its layer of {', '.join(names)} has {error}") from None
        given = {name: part for name, part in zip(names, each, strict=True) if part is not None}
        if twice := sorted(set(given) & set(single)):
            raise UserError(f"{path} has two keys for one matrix, of {twice[0]}; it is damaged or two LoRAs in one")
        single.update(given)
    return single


def _refuse_broken(layers: Mapping[str, dict[str, Tensor]], path: Path) -> None:
    """Raise UserError for layers without both matrices, or with shapes that no LoRA has."""
    if not layers:
        raise UserError(f"{path} is an empty LoRA: it has no layers")
    if broken := [name for name, parts in layers.items() if not {"down", "up"} <= set(parts)]:
        raise UserError(f"{path} is no complete LoRA: layers without both matrices, e.g. {broken[:2]}")
    if misshapen := [name for name, parts in layers.items() if not _is_lora_layer(parts)]:
        raise UserError(f"{path} is damaged: what it has of the layer {misshapen[0]} is no LoRA's")


def lora_from_state(state: Mapping[str, Tensor], rank: int, alpha: float) -> LoraWeights:
    """A LoRA from `AdapterRole.adapter_state` and its shape."""
    return LoraWeights(rank, alpha, {name: value.detach().cpu() for name, value in state.items()})


def _scaled(lora: LoraWeights, alpha: float) -> LoraWeights:
    factor = lora.alpha / alpha
    state = {name: value * factor if name.endswith(".lora_B.weight") else value for name, value in lora.state.items()}
    return LoraWeights(lora.rank, alpha, state)


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


def _uniform(layers: dict[str, dict[str, Tensor]], scale: LoraScale) -> LoraWeights:
    """One rank and alpha for all layers, float32; raises ValueError where no number serves as alpha."""
    ranks = {name: len(parts["down"]) for name, parts in layers.items()}
    alphas = {
        name: float(parts["alpha"]) if "alpha" in parts else scale.alpha_of(name.removeprefix(NETWORK), ranks[name])
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
