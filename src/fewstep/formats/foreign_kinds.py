"""What other kinds of weights are called, by the names of their tensors, so that a refusal says what was given."""

import re
from collections.abc import Iterable

# the first that a name has in it; pieces that plain files have nowhere
_KINDS = {
    r"lora_magnitude_vector|\.dora_scale$": "DoRA",
    r"\.hada_[wt]": "LoHa",
    r"\.lokr_[wt]": "LoKr",
    r"\.oft_|\.boft_|\.vera_": "OFT or VeRA",
    r"\.lora_mid\.": "a LoCon with a core (lora_mid)",
    r"\.lora_B(\.\w+)?\.bias$": "lora_bias",
    r"\.diff(_b)?$|\.[wb]_norm$": "whole differences of weights (.diff)",
    r"^lora_te\d?_|(^|\.)text_encoder(_\d)?\.": "LoRA of a text encoder",
    r"^emb_params$|string_to_param|^clip_[lg]$|^<[^>]*>$": "a textual inversion",
    r"^(image_proj|ip_adapter)\.|\.to_[kv]_ip\.": "an IP-Adapter",
    r"^control(net|_model)[_.]|\.controlnet_": "a ControlNet",
    r"^model_ema\.": "a whole model whose network is there as an average alone (model_ema.*)",
    r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|up|mid)": "a VAE",
    r"^text_model\.|^transformer\.resblocks\.": "a text encoder",
    r"^(time_embed|input_blocks|middle_block|output_blocks)\.": "a U-Net in the keys of guided diffusion or LDM, without their prefix",
    r"(?<!attentions\.\d)(?<!encoder)(^|\.)(transformer_blocks|single_transformer_blocks|joint_blocks|double_blocks|layers|noise_refiner)\.\d": "a transformer",
}  # fmt: skip
_MANY = 10_000  # names that are looked at


def foreign_kind(names: Iterable[str]) -> str:
    """What tensors of these names are; empty where none of the known kinds."""
    shown = list(names)[:_MANY]
    return next((kind for pattern, kind in _KINDS.items() if any(re.search(pattern, name[:500]) for name in shown)), "")
