"""LoRAs that users bring, added to a network's own weights: the network is that fine-tune from then on."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.formats.kohya_lora import LoraWeights, read_lora
from fewstep.formats.lora_list import LoraFile
from fewstep.formats.lora_spellings import LayerAliases
from fewstep.formats.stored_tensors import ReadRows, Rows
from fewstep.networks.lora_layers import low_rank_update

ReadLoras = list[tuple[LoraFile, LoraWeights]]


def read_loras(network: nn.Module, loras: Sequence[LoraFile], aliases: LayerAliases) -> ReadLoras:
    """LoRA files with their weights, in kohya's, diffusers' or PEFT's keys, each compared with a network, on any device.

    Args:
        aliases: other names of its layers, as its family says them.

    Raises:
        UserError: a file that is no LoRA or another network's, shapes that do not fit.
    """
    layers = dict(network.named_modules())
    found = [(lora, read_lora(lora.path, layers, aliases)) for lora in loras]
    for lora, weights in found:
        _check(lora, weights, layers)
    return found


@torch.no_grad()
def merge_loras(network: nn.Module, loras: ReadLoras) -> None:
    """W + strength * alpha / rank * B A for every layer of every LoRA.

    Args:
        network: on the CPU, float32.
    """
    layers = dict(network.named_modules())
    for lora, weights in loras:
        for target in weights.targets:
            weight: Any = layers[target].weight
            weight += lora.strength * update_of(weights, target).view_as(weight)


def with_loras(read: ReadRows, shapes: Mapping[str, tuple[int, ...]], loras: ReadLoras) -> ReadRows:
    """Rows of a network's tensors in float32 as `merge_loras` makes them, of rows without LoRAs.

    Args:
        shapes: of the network's tensors.
    """

    def merged(name: str, rows: Rows) -> Tensor:
        part, target = read(name, rows).float(), name.removesuffix(".weight")
        for lora, weights in loras:
            if name.endswith(".weight") and target in weights.targets:
                update = update_of(weights, target).view(shapes[name])
                part = part + lora.strength * (update if rows is None else update[rows])
        return part

    return merged


def update_of(lora: LoraWeights, target: str) -> Tensor:
    """(alpha / rank) B A of a layer, (out, in x kernel)."""
    down, up = (lora.state[f"{target}.lora_{part}.weight"] for part in "AB")
    return low_rank_update(down, up, lora.alpha / lora.rank)


def _check(lora: LoraFile, weights: LoraWeights, layers: dict[str, nn.Module]) -> None:
    for target in weights.targets:
        down, up = (weights.state[f"{target}.lora_{part}.weight"] for part in "AB")
        weight = getattr(layers[target], "weight", None)
        shape = () if weight is None else tuple(weight.shape)
        kernels = {tuple(size) for size in (shape[2:], down.shape[2:]) if any(side != 1 for side in size)}
        if len(shape) < 2 or (len(up), down.shape[1]) != shape[:2] or kernels - {shape[2:]}:
            raise UserError(
                f"LoRA {lora.path} is for another base: its layer {target} is {tuple(up.shape[:1] + down.shape[1:])}, this "
                f"network's {shape}"
            )
