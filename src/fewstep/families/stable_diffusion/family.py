"""Stable Diffusion 1.x and 2.x, and XL: U-Nets that predict epsilon or v on a discrete schedule."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.schedules import StepSchedule
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.families.diffusers_family import DiffusersFamily
from fewstep.families.family import Description
from fewstep.families.stable_diffusion.config_keys import NETWORK_KEYS, SCHEDULER_KEYS, VAE_READ
from fewstep.families.stable_diffusion.ldm_keys import ldm_layers
from fewstep.families.stable_diffusion.shapes import (
    DISTILLED_RELEASES,
    LORA_TARGETS,
    SHAPES,
    VAE,
    XL_DISTILLED_RELEASES,
    XL_SHAPES,
)
from fewstep.families.stable_diffusion.single_file import LAYOUT, UNREAD_FILES, XL_LAYOUT, XL_UNREAD_FILES
from fewstep.networks.text_layout import TextLayout, read_text_alone

if TYPE_CHECKING:
    from fewstep.networks.text_encoders import TextEmbeddings

_TOKENS = 77  # of CLIP
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
# asked in few steps, with a picture, or with another encoder's texts
_OTHER_PIPELINES = frozenset({
    "LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline", "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLInstructPix2PixPipeline", "KolorsPipeline", "KolorsImg2ImgPipeline",
})  # fmt: skip


class StableDiffusion(DiffusersFamily):
    """Stable Diffusion 1.x and 2.x: one CLIP text encoder."""

    name = "sd"
    title = "Stable Diffusion 1.x or 2.x"
    description_name = "diffusers-unet"
    component = "unet"
    network_class = "UNet2DConditionModel"
    scheduler_class = "LCMScheduler"
    lora_targets = LORA_TARGETS
    kohya_names = "diffusers"
    comfyui_lora = "kohya-lora"
    distilled_releases = DISTILLED_RELEASES
    other_pipelines = _OTHER_PIPELINES
    single_file = LAYOUT
    unread_files = UNREAD_FILES
    file_words: tuple[str, ...] = ("sd",)
    safety_checker = "diffusers.pipelines.stable_diffusion.safety_checker:StableDiffusionSafetyChecker"
    shapes = SHAPES
    autoencoder_config = VAE
    scheduler_keys = SCHEDULER_KEYS
    network_keys = NETWORK_KEYS
    vae_read = VAE_READ
    text_layout = TextLayout(
        "sd", title, "StableDiffusionPipeline", {"text_encoder": ("CLIPTextModel",), "tokenizer": _TOKENIZERS},
        pipeline_options={"requires_safety_checker": False}, read_encoded=read_text_alone,
    )  # fmt: skip

    def has_network(self, config: dict[str, Any]) -> bool:
        return config.get("addition_embed_type") != "text_time"

    def build_around(self, network: Any, scheduler: dict[str, Any], latent_size: int) -> DiffusersDenoiser:
        from fewstep.families.stable_diffusion.denoiser import DiffusersUNetDenoiser

        return DiffusersUNetDenoiser(network, scheduler, latent_size)

    def example_condition(self, denoiser: Denoiser, size: int) -> Condition:
        network: Any = denoiser.network
        config = network.config
        text = torch.zeros(size, _TOKENS, _text_width(config))
        return Condition(size, {"text": text}, {"text": text[:1]})

    def layer_aliases(self, description: Description, modules: Iterable[str]) -> Mapping[str, str]:
        return ldm_layers(modules, description["network"])

    def few_step_scheduler(self, denoiser: Denoiser, steps: StepSchedule) -> Any:
        from fewstep.families.stable_diffusion.few_step_scheduler import build_few_step_scheduler

        return build_few_step_scheduler(denoiser, steps)


def _text_width(config: Any) -> int:
    """Width of the text that every block reads, which a config may say for each."""
    width = config.cross_attention_dim
    return int(width[0] if isinstance(width, list | tuple) else width)


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, a pooled embedding and the picture's size as time ids."""

    name = "sdxl"
    title = "SDXL"
    single_file = XL_LAYOUT
    unread_files = XL_UNREAD_FILES
    file_words = ("sdxl", "xl")
    distilled_releases = XL_DISTILLED_RELEASES
    shapes = XL_SHAPES
    one_step_indices = (399,)
    text_layout = TextLayout(
        "sdxl", title, "StableDiffusionXLPipeline",
        {
            "text_encoder": ("CLIPTextModel",), "text_encoder_2": ("CLIPTextModelWithProjection",),
            "tokenizer": _TOKENIZERS, "tokenizer_2": _TOKENIZERS,
        },
        pipeline_options={"add_watermarker": False}, index_options=("force_zeros_for_empty_prompt",),
        zeros_option="force_zeros_for_empty_prompt",
    )  # fmt: skip

    def has_network(self, config: dict[str, Any]) -> bool:
        return config.get("addition_embed_type") == "text_time"

    def build_around(self, network: Any, scheduler: dict[str, Any], latent_size: int) -> DiffusersDenoiser:
        ids, whole = network.config.addition_time_embed_dim, network.config.projection_class_embeddings_input_dim
        if not (ids and whole and 6 * ids < whole):
            raise ValueError(
                f"its unet has addition_time_embed_dim={ids}, of which six leave no room for a pooled text in "
                f"projection_class_embeddings_input_dim={whole}"
            )
        return super().build_around(network, scheduler, latent_size)

    def condition(self, embeddings: "TextEmbeddings", empty: "TextEmbeddings", size: tuple[int, int]) -> Condition:
        """As the base's, with time ids (height, width, 0, 0, height, width) that guidance leaves as they are."""
        found = super().condition(embeddings, empty, size)
        ids = torch.tensor([*size, 0, 0, *size], device=embeddings.text.device).float().expand(len(found), 6)
        return Condition(len(found), {**found.parts, "time_ids": ids}, {**found.empty, "time_ids": "same"})

    def example_condition(self, denoiser: Denoiser, size: int) -> Condition:
        network: Any = denoiser.network
        config = network.config
        text = torch.zeros(size, _TOKENS, _text_width(config))
        pooled = torch.zeros(size, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
        parts = {"text": text, "pooled": pooled, "time_ids": torch.zeros(size, 6)}
        return Condition(size, parts, {"text": text[:1], "pooled": pooled[:1], "time_ids": "same"})
