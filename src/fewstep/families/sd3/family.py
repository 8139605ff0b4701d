"""Stable Diffusion 3: a transformer that predicts the flow on straight paths, with up to three text encoders."""

from typing import Any

import torch

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.schedules import StepSchedule
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.families.diffusers_family import DiffusersFamily
from fewstep.families.sd3.config_keys import NETWORK_KEYS, SCHEDULER_KEYS, VAE_READ
from fewstep.families.sd3.shapes import DISTILLED_RELEASES, LORA_TARGETS, SHAPES, UNREAD_FILES, VAE
from fewstep.networks.text_layout import TextLayout

_CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_TOKENS = 77 + 256  # of CLIP and of T5


class StableDiffusion3(DiffusersFamily):
    """Stable Diffusion 3, with or without its T5 text encoder."""

    name = "sd3"
    title = "Stable Diffusion 3"
    description_name = "sd3"
    component = "transformer"
    network_class = "SD3Transformer2DModel"
    scheduler_class = "FlowMatchLCMScheduler"
    distilled_releases = DISTILLED_RELEASES
    lora_targets = LORA_TARGETS
    unread_files = UNREAD_FILES
    shapes = SHAPES
    autoencoder_config = VAE
    scheduler_keys = SCHEDULER_KEYS
    network_keys = NETWORK_KEYS
    vae_read = VAE_READ
    text_layout = TextLayout(
        "sd3", title, "StableDiffusion3Pipeline",
        {
            "text_encoder": ("CLIPTextModelWithProjection",), "text_encoder_2": ("CLIPTextModelWithProjection",),
            "text_encoder_3": ("T5EncoderModel",), "tokenizer": _CLIP_TOKENIZERS, "tokenizer_2": _CLIP_TOKENIZERS,
            "tokenizer_3": ("T5TokenizerFast", "T5Tokenizer"),
        },
        optional=("text_encoder_3", "tokenizer_3"), encode_options={"prompt_2": None, "prompt_3": None},
        network="transformer", token_limits={"tokenizer_3": 256},
    )  # fmt: skip

    def has_network(self, config: dict[str, Any]) -> bool:
        return True

    def build_around(self, network: Any, scheduler: dict[str, Any], latent_size: int) -> DiffusersDenoiser:
        from fewstep.families.sd3.denoiser import SD3Denoiser

        return SD3Denoiser(network, scheduler, latent_size)

    def example_condition(self, denoiser: Denoiser, size: int) -> Condition:
        network: Any = denoiser.network
        config = network.config
        text = torch.zeros(size, _TOKENS, config.joint_attention_dim)
        pooled = torch.zeros(size, config.pooled_projection_dim)
        return Condition(size, {"text": text, "pooled": pooled}, {"text": text[:1], "pooled": pooled[:1]})

    def few_step_scheduler(self, denoiser: Denoiser, steps: StepSchedule) -> Any:
        from fewstep.families.few_steps import build_flow_scheduler

        return build_flow_scheduler(denoiser, steps, None)
