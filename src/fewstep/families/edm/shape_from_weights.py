"""The shape of an EDM network from the names and shapes of its weights, where a file has nothing else."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fewstep.families.edm.unet import EDMUNetConfig

_LEVEL = re.compile(r"model\.enc\.(\d+)x\1_(?:conv|down)\.")
_MAX_SIDE = 4096


def edm_config_from_weights(weights: Mapping[str, Tensor]) -> EDMUNetConfig:
    """The configuration whose network has these weights, read as METHOD section 7 lists the released families.

    What leaves no trace in the weights is taken as released: no dropout (distillation has none), pixels not folded,
    and the filter of NCSN++ [1, 3, 3, 1], of the others [1, 1], where the file has no `resample_filter`.

    Args:
        weights: state dict under EDM's keys (`model.enc.64x64_conv.weight`).

    Raises:
        ValueError: no such network; the caller still compares names and shapes with the network built from it.
    """
    try:
        return _config(weights)
    except (KeyError, IndexError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(
            f"its weights are no EDM network this library knows ({type(error).__name__}: {error})"
        ) from error


def _config(weights: Mapping[str, Tensor]) -> EDMUNetConfig:
    if empty := [name for name, value in weights.items() if not value.numel()]:
        raise ValueError(f"its tensors {empty[:2]} are empty")
    sides = sorted({int(match[1]) for name in weights if (match := _LEVEL.match(name))}, reverse=True)
    top = sides[0]
    if top > _MAX_SIDE or sides != [top >> level for level in range(len(sides))]:
        raise ValueError(
            f"its encoder works at the resolutions {sides[:8]}, which do not halve from {_MAX_SIDE} or less"
        )
    first, layer0 = weights[f"model.enc.{top}x{top}_conv.weight"], weights["model.map_layer0.weight"]
    song = f"model.dec.{top}x{top}_aux_conv.weight" in weights
    channels = first.shape[0] if song else layer0.shape[1]
    blocks = {name.split(".")[2] for name in weights if name.startswith(f"model.enc.{top}x{top}_block")}
    residual = any("_aux_residual." in name for name in weights)
    return EDMUNetConfig(
        family="song" if song else "adm",
        img_resolution=top,
        img_channels=first.shape[1],
        label_dim=_inputs(weights, "map_label"),
        model_channels=channels,
        channel_mult=tuple(weights[f"model.enc.{r}x{r}_block0.conv0.weight"].shape[0] // channels for r in sides),
        channel_mult_emb=layer0.shape[0] // channels,
        num_blocks=len(blocks),
        attn_resolutions=tuple(r for r in sides if f"model.enc.{r}x{r}_block0.qkv.weight" in weights),
        augment_dim=_inputs(weights, "map_augment"),
        embedding_type="fourier" if "model.map_noise.freqs" in weights else "positional",
        encoder_type="residual" if residual else "standard",
        channel_mult_noise=layer0.shape[1] // channels if song else 1,
        resample_filter=_taps(weights, (1, 3, 3, 1) if residual else (1, 1)),
    )


def _inputs(weights: Mapping[str, Tensor], layer: str) -> int:
    """Inputs of an optional embedding layer."""
    weight = weights.get(f"model.{layer}.weight")
    return 0 if weight is None else weight.shape[1]


def _taps(weights: Mapping[str, Tensor], otherwise: tuple[int, ...]) -> tuple[int, ...]:
    """Integer taps of the filter whose normalised outer product the buffers hold."""
    for name, value in weights.items():
        if name.endswith(".resample_filter"):
            line = value.double().flatten(0, -2).sum(0)
            taps = (line / line.min()).round() if len(line) <= 8 else torch.zeros(1)
            if not bool((taps >= 1).all()) or float(taps.max()) > 64:
                raise ValueError(f"{name} is no resampling filter")
            return tuple(int(tap) for tap in taps)
    return otherwise
