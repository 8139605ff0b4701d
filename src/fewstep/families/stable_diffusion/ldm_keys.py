"""The keys of single-file checkpoints in the LDM layout (Stable Diffusion 1.x, SDXL), to and from diffusers' names.

Names are derived from a component's config, for any number of blocks. A few tensors also change their shape: the VAE's
attention projections are 1x1 convolutions there, and OpenCLIP (SDXL's second text encoder) keeps query, key and value
in one matrix and its text projection transposed.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.compare import state_difference

# family -> component -> what its keys begin with
PREFIXES: dict[str, dict[str, str]] = {
    "sd": {
        "unet": "model.diffusion_model.", "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.transformer.text_model.",
    },
    "sdxl": {
        "unet": "model.diffusion_model.", "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.transformer.text_model.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}  # fmt: skip
# Found in published files beside the weights; no diffusers component has them
_IGNORED = re.compile(r"embeddings\.position_ids|logit_scale|attn_mask|loss\..*|model_ema\..*")
_UNET_LAYERS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET_BLOCKS = {
    "down_block_types": {"DownBlock2D", "CrossAttnDownBlock2D"}, "up_block_types": {"UpBlock2D", "CrossAttnUpBlock2D"},
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}  # fmt: skip
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn": "attn",
}  # fmt: skip
_FUSED = re.compile(r"(.*\.attn\.)in_proj_(weight|bias)")
_QUERY = re.compile(r"(.*\.attn\.)q_proj\.(weight|bias)")


def to_ldm(family: str, component: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """One component's state dict under its single-file keys.

    Args:
        family: "sd" or "sdxl".
        component: "unet", "vae", "text_encoder" or "text_encoder_2".
        state: diffusers' (or transformers') state dict; meta tensors do.
        config: the component's config.

    Raises:
        UserError: block types that the layout does not have; names them.
    """
    if component == "unet":
        check_unet_config(config)
    renamed = {ldm_name(component, name, config): value for name, value in state.items()}
    if component == "vae":
        renamed = {key: value[..., None, None] if _is_vae_projection(key) else value for key, value in renamed.items()}
    if component == "text_encoder_2":
        renamed = _fuse_projections(renamed)
    return {PREFIXES[family][component] + key: value for key, value in renamed.items()}


def from_ldm(
    component: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Inverse of `to_ldm`.

    Args:
        component: as in `to_ldm`.
        tensors: the component's tensors by their keys without the prefix.
        config: the component's config.
        shapes: names and shapes of the network with this config.

    Raises:
        UserError: tensors that this network lacks, or the other way round, or of another shape; names some.
    """
    if component == "unet":
        check_unet_config(config)
    table = {ldm_name(component, name, config): name for name in shapes}
    found = {key: value for key, value in tensors.items() if not _IGNORED.fullmatch(key)}
    if component == "vae":
        found = {key: _as_matrix(value) if _is_vae_projection(key) else value for key, value in found.items()}
    if component == "text_encoder_2":
        found = _split_projections(found)
    if fault := state_difference(found, {key: tuple(shapes[name]) for key, name in table.items()}):
        raise UserError(f"its {component} is another network than the config of the base says: {fault}")
    return {name: found[key] for key, name in table.items()}


def ldm_name(component: str, name: str, config: Mapping[str, Any]) -> str:
    """Single-file key, without the component's prefix, of one of diffusers' parameter names.

    SDXL's second text encoder gets the names of separate query, key and value projections here.
    """
    if component == "unet":
        return _unet_name(name, config)
    if component == "vae":
        return _vae_name(name, config)
    name = name.removeprefix("text_model.")  # not in every version of transformers
    return name if component == "text_encoder" else _open_clip_name(name)


def ldm_layers(modules: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """{the LDM name of a U-Net's layer: its name here}, for those of `modules` that the layout has.

    Args:
        modules: names of the U-Net's modules in diffusers; containers and layers without weights are left out.
        config: the U-Net's config; block types that the layout does not have give an empty dict.
    """
    names = list(modules)
    containers = {name[:place] for name in names for place, letter in enumerate(name) if letter == "."}
    layers: dict[str, str] = {}
    with suppress(UserError):
        check_unet_config(config)
        for name in names:
            if name and name not in containers:
                with suppress(UserError):
                    layers[ldm_name("unet", f"{name}.weight", config).removesuffix(".weight")] = name
    return layers


def check_unet_config(config: Mapping[str, Any]) -> None:
    """Raise UserError for U-Nets that the LDM layout cannot hold."""
    for field, known in _UNET_BLOCKS.items():
        if other := set(config[field]) - known:
            raise UserError(f"a U-Net with {sorted(other)} has no single-file layout; {sorted(known)} do")
    if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") != "UNetMidBlock2DCrossAttn":
        raise UserError(f"a U-Net with mid block {config['mid_block_type']} has no single-file layout")
    if not isinstance(config["layers_per_block"], int):
        raise UserError("a U-Net with different layers_per_block has no single-file layout that diffusers reads")


def _unet_name(name: str, config: Mapping[str, Any]) -> str:
    module, _, leaf = name.rpartition(".")
    if module in _UNET_LAYERS:
        return f"{_UNET_LAYERS[module]}.{leaf}"
    stride = config["layers_per_block"] + 1
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        part, number, rest = match[1], int(match[2]), match[3]
        place = 2 * number + (part == "attentions")
        return f"middle_block.{place}.{_inside_unet(part, rest)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
    if match is None:
        raise UserError(f"the U-Net's tensor {name} has no place in a single-file checkpoint")
    way, block, part, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    first = block * stride + (way == "down")
    blocks = "input_blocks" if way == "down" else "output_blocks"
    if part == "downsamplers":  # an input block of its own
        return f"{blocks}.{first + stride - 1}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":  # the last part of the block's last output block
        place = 2 if "CrossAttn" in config["up_block_types"][block] else 1
        return f"{blocks}.{first + stride - 1}.{place}.{rest}"
    return f"{blocks}.{first + number}.{int(part == 'attentions')}.{_inside_unet(part, rest)}"


def _inside_unet(part: str, rest: str) -> str:
    if part == "attentions":
        return rest
    layer, _, leaf = rest.partition(".")
    if layer not in _UNET_RESNET:
        raise UserError(f"the U-Net's {part} have no {layer} in a single-file checkpoint")
    return f"{_UNET_RESNET[layer]}.{leaf}"


def _vae_name(name: str, config: Mapping[str, Any]) -> str:
    name = name.replace("conv_norm_out.", "norm_out.")
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        side, part, number, rest = match[1], match[2], int(match[3]) + 1, match[4]
        if part == "attentions":
            layer, _, leaf = rest.rpartition(".")
            return f"{side}.mid.attn_{number}.{_VAE_ATTENTION[layer]}.{leaf}"
        return f"{side}.mid.block_{number}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
    match = re.fullmatch(
        r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.*)", name
    )
    if match is None:
        return name
    blocks, block, part, rest = match[1], int(match[2]), match[3], match[5]
    if blocks == "decoder.up":  # counted from the finest resolution
        block = len(config["up_block_types"]) - 1 - block
    if part != "resnets":  # downsamplers -> downsample
        return f"{blocks}.{block}.{part.removesuffix('rs')}.{rest}"
    return f"{blocks}.{block}.block.{match[4]}.{rest.replace('conv_shortcut', 'nin_shortcut')}"


def _open_clip_name(name: str) -> str:
    if name in _OPEN_CLIP:
        return _OPEN_CLIP[name]
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)", name)
    if match is None:
        raise UserError(f"the text encoder's tensor {name} has no place in a single-file checkpoint")
    rest = match[2]
    for theirs, ours in _OPEN_CLIP_LAYER.items():
        if rest.startswith(f"{theirs}."):
            rest = f"{ours}.{rest.removeprefix(f'{theirs}.')}"
            break
    return f"transformer.resblocks.{match[1]}.{rest}"


def _is_vae_projection(key: str) -> bool:
    return ".mid.attn_" in key and key.endswith((".q.weight", ".k.weight", ".v.weight", ".proj_out.weight"))


def _as_matrix(value: Tensor) -> Tensor:
    """A 1x1 convolution's weight (M, N, 1, 1) or (M, N, 1) as a matrix (M, N)."""
    return value.reshape(value.shape[:2]) if value.ndim > 2 and set(value.shape[2:]) == {1} else value


def _fuse_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's own tensors from those with separate projections."""
    fused: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if match := _QUERY.fullmatch(key):
            parts = [tensors[f"{match[1]}{letter}_proj.{match[2]}"] for letter in "qkv"]
            fused[f"{match[1]}in_proj_{match[2]}"] = torch.cat(parts)
        elif not re.search(r"\.attn\.[kv]_proj\.", key):
            fused[key] = value.T if key == "text_projection" else value
    return fused


def _split_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    split: dict[str, Tensor] = {}
    for key, value in tensors.items():
        match = _FUSED.fullmatch(key)
        if match and value.ndim and value.shape[0] and value.shape[0] % 3 == 0:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                split[f"{match[1]}{letter}_proj.{match[2]}"] = part
        else:
            split[key] = value.T if key == "text_projection" and value.ndim == 2 else value
    return split
