"""How models of Stable Diffusion 1.x and SDXL lie in one file: the LDM layout."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from fewstep.families.stable_diffusion.ldm_keys import PREFIXES, from_ldm, to_ldm
from fewstep.families.stable_diffusion.schedule import discrete_alphas_cumprod
from fewstep.families.stable_diffusion.shapes import SCHEDULER
from fewstep.formats.single_file import SingleFileLayout

UNREAD_FILES = {"cond_stage_model.model.": "Stable Diffusion 2.x"}
XL_UNREAD_FILES = {"conditioner.embedders.0.model.": "the SDXL refiner"}
_CLASSES = {
    "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}  # fmt: skip


_SETTINGS: dict[str, dict[str, Any]] = {
    "unet": {
        "flip_sin_to_cos": True, "freq_shift": 0, "act_fn": "silu", "norm_eps": 1e-5, "norm_num_groups": 32, "resnet_time_scale_shift": "default",
    },
    "vae": {
        "scaling_factor": 0.18215, "act_fn": "silu", "norm_num_groups": 32, "use_quant_conv": True, "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    },
    "text_encoder": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 49408},
    "text_encoder_2": {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 32, "num_attention_heads": 20, "vocab_size": 49408},
    "scheduler": SCHEDULER,
}  # fmt: skip
_XL_SCALE, _XL_HEAD = 0.13025, 64


def _assumed(component: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What programs take Stable Diffusion 1.5's settings to be."""
    return {**_SETTINGS[component], **({"attention_head_dim": 8} if component == "unet" else {})}


def _xl_assumed(component: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What programs take SDXL's settings to be: heads of 64 channels."""
    own: dict[str, Any] = {"vae": {"scaling_factor": _XL_SCALE}}.get(component, {})
    if component == "unet":
        own = {"attention_head_dim": [width // _XL_HEAD for width in config["block_out_channels"]]}
    return {**_SETTINGS[component], **own}


def _no_text_encoder_of_2(config: Mapping[str, Any]) -> str:
    """Why a text encoder has no place in a file of 1.x; empty: it has."""
    if config.get("hidden_act") == "quick_gelu":
        return ""
    return (
        "this model has the text encoder of 2.x, whose file has a layer more than diffusers keeps; export it as a diffusers "
        "folder"
    )


LAYOUT = SingleFileLayout(
    family="sd",
    title="Stable Diffusion 1.x",
    architecture="stable-diffusion-v1",
    prefixes=PREFIXES["sd"],
    classes=_CLASSES,
    to_file=partial(to_ldm, "sd"),
    from_file=from_ldm,
    alphas_cumprod=discrete_alphas_cumprod,
    refuse_text_encoder=_no_text_encoder_of_2,
    assumed=_assumed,
    may_skip_layers=True,  # XL is read before the last layer always
)
XL_LAYOUT = SingleFileLayout(
    family="sdxl",
    title="SDXL",
    architecture="stable-diffusion-xl-v1-base",
    prefixes=PREFIXES["sdxl"],
    classes=_CLASSES,
    to_file=partial(to_ldm, "sdxl"),
    from_file=from_ldm,
    alphas_cumprod=discrete_alphas_cumprod,
    assumed=_xl_assumed,
    marks=(PREFIXES["sdxl"]["text_encoder_2"], f"{PREFIXES['sdxl']['unet']}label_emb."),
    foreign_marks=tuple(XL_UNREAD_FILES),
)
