"""FLUX.2 klein: a transformer that predicts the flow of 2x2 patches beside a caption's tokens, with Qwen3 as text encoder."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.families.diffusers_folder import has_guidance_built_in
from fewstep.families.family import Description
from fewstep.families.flow import FlowFamily
from fewstep.families.flux2_klein.config_keys import NETWORK_KEYS, VAE_KEYS
from fewstep.families.flux2_klein.original_names import original_names
from fewstep.families.flux2_klein.shapes import (
    DISTILLED_RELEASES,
    GENERATOR_INDEX,
    IS_DISTILLED,
    LORA_TARGETS,
    SHAPES,
    UNREAD_FILES,
    VAE,
)
from fewstep.formats.diffusers_index import INDEX, read_json
from fewstep.networks.text_layout import TextLayout, read_text_alone

_TOKENS = 512  # of a caption in its template, as the pipeline cuts and pads it


def in_template(tokenizer: Any, prompt: str) -> str:
    """A prompt in the tokenizer's chat template, thinking off, as Flux2KleinPipeline puts it there."""
    message = [{"role": "user", "content": prompt}]
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    return str(tokenizer.apply_chat_template(message, **options))


class Flux2Klein(FlowFamily):
    """FLUX.2 klein, the base models; guidance is neg + w (pos - neg), formed by the pipeline."""

    name = "flux2-klein"
    title = "FLUX.2 klein"
    description_name = "flux2-klein"
    network_class = "Flux2Transformer2DModel"
    default_guidance_scale = 4.0
    export_precision = "bf16"  # as its pipeline is used in diffusers' documentation
    distilled_releases = DISTILLED_RELEASES
    lora_targets = LORA_TARGETS
    kohya_names = "original"
    comfyui_lora = "kohya-lora"
    unread_files = UNREAD_FILES
    shapes = SHAPES
    autoencoder_config = VAE
    generator_index = GENERATOR_INDEX
    network_keys = NETWORK_KEYS
    vae_keys = VAE_KEYS
    vae_read = ("shift_factor",)  # which the pipeline does not read
    text_layout = TextLayout(
        "flux2-klein", title, "Flux2KleinPipeline",
        {"text_encoder": ("Qwen3ForCausalLM",), "tokenizer": ("Qwen2TokenizerFast", "Qwen2Tokenizer")},
        encode_options={"max_sequence_length": _TOKENS}, read_encoded=read_text_alone, chat=in_template,
        min_layers=27, token_limits={"tokenizer": _TOKENS},
    )  # fmt: skip

    def build_around(self, network: Any, scheduler: dict[str, Any], latent_size: int) -> DiffusersDenoiser:
        from fewstep.families.flux2_klein.denoiser import Flux2KleinDenoiser

        return Flux2KleinDenoiser(network, scheduler, latent_size, self.default_num_steps)

    def autoencoder_classes(self) -> dict[str, Any]:
        from fewstep.families.flux2_klein.autoencoder import Flux2Autoencoder

        return {VAE_KEYS.classes[0]: Flux2Autoencoder}

    def layer_aliases(self, description: Description, modules: Iterable[str]) -> Mapping[str, str | tuple[str, ...]]:
        return original_names(modules)

    def example_condition(self, denoiser: Denoiser, size: int) -> Condition:
        network: Any = denoiser.network
        text = torch.zeros(size, _TOKENS, network.config.joint_attention_dim)
        return Condition(size, {"text": text}, {"text": text[:1]})

    def _distilled_release(self, folder: Path) -> str:
        """By its names, or by what its index says of it; generators exported from here are known by their scheduler."""
        if release := super()._distilled_release(folder):
            return release
        if has_guidance_built_in(folder):
            return ""
        return IS_DISTILLED if read_json(folder / INDEX, folder, "model_index").get("is_distilled") else ""
