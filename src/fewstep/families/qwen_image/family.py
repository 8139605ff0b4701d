"""Qwen-Image: a transformer that predicts the flow of 2x2 patches beside a caption's tokens, with Qwen2.5-VL as text encoder."""

from typing import Any

import torch

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.families.flow import FlowFamily
from fewstep.families.qwen_image.config_keys import NETWORK_KEYS, VAE_KEYS, VAE_READ
from fewstep.families.qwen_image.shapes import (
    DISTILLED_RELEASES,
    GUIDANCE_OFF,
    LORA_TARGETS,
    SHAPES,
    UNREAD_FILES,
    VAE,
)
from fewstep.networks.text_layout import TextLayout, read_text_masked

_TOKENS = 512  # of a caption and the template's end, as the pipeline cuts it by default
_DROPPED = 34  # tokens of the template's beginning, which the network does not see
_START = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships "
    "of the objects and background:<|im_end|>\n<|im_start|>user\n"
)


def in_template(tokenizer: Any, prompt: str) -> str:
    """A prompt as QwenImagePipeline puts it into its template."""
    return f"{_START}{prompt}<|im_end|>\n<|im_start|>assistant\n"


class QwenImage(FlowFamily):
    """Qwen-Image; guidance is neg + w (pos - neg), each token at the norm of pos, formed by the pipeline."""

    name = "qwen-image"
    title = "Qwen-Image"
    description_name = "qwen-image"
    network_class = "QwenImageTransformer2DModel"
    default_guidance_scale = 4.0
    export_precision = "bf16"  # as its pipeline is used in diffusers' documentation
    guidance_off = GUIDANCE_OFF
    distilled_releases = DISTILLED_RELEASES
    lora_targets = LORA_TARGETS
    kohya_names = "diffusers"
    comfyui_lora = "lora"
    unread_files = UNREAD_FILES
    shapes = SHAPES
    autoencoder_config = VAE
    network_keys = NETWORK_KEYS
    vae_keys = VAE_KEYS
    vae_read = VAE_READ
    text_layout = TextLayout(
        "qwen-image", title, "QwenImagePipeline",
        {
            "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
            "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
        },
        encode_options={"max_sequence_length": _TOKENS}, read_encoded=read_text_masked, chat=in_template,
        empty_prompt=" ", token_limits={"tokenizer": _DROPPED + _TOKENS},
    )  # fmt: skip

    def build_around(self, network: Any, scheduler: dict[str, Any], latent_size: int) -> DiffusersDenoiser:
        from fewstep.families.qwen_image.denoiser import QwenImageDenoiser

        return QwenImageDenoiser(network, scheduler, latent_size, self.default_num_steps)

    def autoencoder_classes(self) -> dict[str, Any]:
        from fewstep.families.qwen_image.autoencoder import QwenImageAutoencoder

        return {VAE_KEYS.classes[0]: QwenImageAutoencoder}

    def example_condition(self, denoiser: Denoiser, size: int) -> Condition:
        network: Any = denoiser.network
        text = torch.zeros(size, _TOKENS, network.config.joint_attention_dim)
        length = torch.full((size,), _TOKENS)
        return Condition(size, {"text": text, "text_length": length}, {"text": text[:1], "text_length": length[:1]})
