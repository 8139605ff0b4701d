"""Z-Image: a transformer that predicts the flow over one stream of image and caption tokens, with Qwen3 as text encoder."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.families.family import Description
from fewstep.families.flow import FlowFamily
from fewstep.families.z_image.config_keys import NETWORK_KEYS, VAE_READ
from fewstep.families.z_image.shapes import DISTILLED_RELEASES, GUIDANCE_OFF, LORA_TARGETS, SHAPES, UNREAD_FILES, VAE
from fewstep.networks.text_layout import TextLayout, read_text_list

_TOKENS = 512  # of a caption in its template, as the pipeline cuts it


def in_template(tokenizer: Any, prompt: str) -> str:
    """A prompt in the tokenizer's chat template, thinking on, as ZImagePipeline puts it there."""
    message = [{"role": "user", "content": prompt}]
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    return str(tokenizer.apply_chat_template(message, **options))


class ZImage(FlowFamily):
    """Z-Image, the base model; its pipeline writes guidance as pos + g (pos - neg), which is a guidance_scale of g + 1 here."""

    name = "z-image"
    title = "Z-Image"
    description_name = "z-image"
    network_class = "ZImageTransformer2DModel"
    default_guidance_scale = 6.0
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
    vae_read = VAE_READ
    text_layout = TextLayout(
        "z-image", title, "ZImagePipeline",
        {"text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"), "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast")},
        encode_options={"max_sequence_length": _TOKENS}, read_encoded=read_text_list, chat=in_template,
        token_limits={"tokenizer": _TOKENS},
    )  # fmt: skip

    def build_around(self, network: Any, scheduler: dict[str, Any], latent_size: int) -> DiffusersDenoiser:
        from fewstep.families.z_image.denoiser import ZImageDenoiser

        return ZImageDenoiser(network, scheduler, latent_size, self.default_num_steps)

    def layer_aliases(self, description: Description, modules: Iterable[str]) -> Mapping[str, str | tuple[str, ...]]:
        """An attention's projections as the original code calls them: the last one, and the other three in one layer."""
        last, found = ".to_out.0", dict[str, str | tuple[str, ...]]()
        for name in modules:
            if name.endswith(f".attention{last}"):
                attention = name.removesuffix(last)
                found[f"{attention}.out"] = name
                found[f"{attention}.qkv"] = tuple(f"{attention}.to_{part}" for part in "qkv")
        return found

    def example_condition(self, denoiser: Denoiser, size: int) -> Condition:
        network: Any = denoiser.network
        text = torch.zeros(size, _TOKENS, network.config.cap_feat_dim)
        length = torch.full((size,), _TOKENS)
        return Condition(size, {"text": text, "text_length": length}, {"text": text[:1], "text_length": length[:1]})
