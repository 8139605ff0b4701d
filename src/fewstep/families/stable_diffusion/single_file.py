"""How models of Stable Diffusion 1.x and SDXL lie in one file: the LDM layout."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from fewstep.families.stable_diffusion.ldm_keys import PREFIXES, from_ldm, to_ldm
from fewstep.families.stable_diffusion.schedule import discrete_alphas_cumprod
from fewstep.formats.single_file import SingleFileLayout

UNREAD_FILES = {"cond_stage_model.model.": "Stable Diffusion 2.x"}
XL_UNREAD_FILES = {"conditioner.embedders.0.model.": "the SDXL refiner"}
_CLASSES = {
    "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}  # fmt: skip


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
    marks=(PREFIXES["sdxl"]["text_encoder_2"], f"{PREFIXES['sdxl']['unet']}label_emb."),
    foreign_marks=tuple(XL_UNREAD_FILES),
)
