"""Layers of FLUX.2's transformer as its original code calls them, which kohya's tools and ComfyUI read LoRAs by.

Written beside diffusers' `_convert_kohya_flux2_lora_to_diffusers` and `_convert_non_diffusers_flux2_lora_to_diffusers`, which are
private; a test holds what is read equal to theirs. `norm_out.linear` has no name here: its halves change places between the two.
"""

import re
from collections.abc import Iterable

_TOGETHER = {"img_attn.qkv": ("to_q", "to_k", "to_v"), "txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
_OF_DOUBLE_BLOCKS = {
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2", "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
}  # fmt: skip
_OF_SINGLE_BLOCKS = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
_AROUND = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
}  # fmt: skip
_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")


def original_names(modules: Iterable[str]) -> dict[str, str | tuple[str, ...]]:
    """{name in the original code: the module, or the three whose rows stand one below the other in it}."""
    found: dict[str, str | tuple[str, ...]] = {}
    known = dict.fromkeys(modules)
    for name in known:
        block = _BLOCK.fullmatch(name)
        if block is None:
            if name in _AROUND:
                found[_AROUND[name]] = name
            continue
        single, number, layer = block.groups()
        if single and layer in _OF_SINGLE_BLOCKS:
            found[f"single_blocks.{number}.{_OF_SINGLE_BLOCKS[layer]}"] = name
        elif not single and layer in _OF_DOUBLE_BLOCKS:
            found[f"double_blocks.{number}.{_OF_DOUBLE_BLOCKS[layer]}"] = name
        elif not single:
            for words, parts in _TOGETHER.items():
                together = tuple(f"transformer_blocks.{number}.attn.{part}" for part in parts)
                if name == together[0] and all(part in known for part in together):
                    found[f"double_blocks.{number}.{words}"] = together
    return found
