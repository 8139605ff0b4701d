"""Named shapes of text-to-image networks, as published in their diffusers configs: known without any download."""

from typing import Any

import torch

from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.families.edm.shapes import released_network_config

_BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip
# Stable Diffusion 1.5 (859.5 M parameters), SDXL base 1.0 (2567.5 M), Stable Diffusion 3 medium (2028.3 M)
TEXT_NETWORKS: dict[str, dict[str, Any]] = {
    "sd15": {
        "family": "diffusers-unet", "latent_size": 64, "scheduler": _BETAS,
        "network": {
            "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
            "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8,
            "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        },
    },
    "sdxl": {
        "family": "diffusers-unet", "latent_size": 128, "scheduler": _BETAS,
        "network": {
            "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
            "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
    },
    "sd3-medium": {
        "family": "sd3", "latent_size": 128, "scheduler": {"num_train_timesteps": 1000, "shift": 3.0},
        "network": {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
            "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
        },
    },
}  # fmt: skip
# The VAE of all three (SD 3's has 16 latent channels): 84 M parameters, 8 pixels a latent side
VAE_NETWORK: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
VAE_FACTOR = 8


def build_released_denoiser(name: str, resolution: int = 0) -> Denoiser:
    """The untrained network of a released model, on the meta device: shapes without memory.

    Args:
        name: a released EDM network, or one of `TEXT_NETWORKS`.
        resolution: side of a text-to-image model's pictures in pixels; 0 takes the model's own.

    Raises:
        ValueError: the name is unknown, or no latent has this resolution.
        UserError: the libraries of text-to-image models are not installed.
    """
    if name not in TEXT_NETWORKS:
        try:
            config = released_network_config(name)
        except ValueError as error:
            raise ValueError(f"{error}, or of the text-to-image ones {sorted(TEXT_NETWORKS)}") from None
        with torch.device("meta"):
            return EDMDenoiser(config)
    if resolution % VAE_FACTOR:
        raise ValueError(f"teacher.resolution={resolution} is no multiple of the VAE's factor {VAE_FACTOR}")
    description = dict(TEXT_NETWORKS[name])
    return build_text_denoiser(description | ({"latent_size": resolution // VAE_FACTOR} if resolution else {}))


def build_text_denoiser(description: dict[str, Any]) -> Denoiser:
    """The untrained text-to-image network of a description, on the meta device.

    Raises:
        UserError: diffusers is not installed.
    """
    try:
        from diffusers import SD3Transformer2DModel, UNet2DConditionModel

        from fewstep.families.sd3.denoiser import SD3Denoiser
        from fewstep.families.stable_diffusion.denoiser import DiffusersUNetDenoiser
    except ImportError as error:
        raise UserError(f"text-to-image models need {error.name}: pip install 'fewstep[text]'") from error
    kinds: dict[str, Any] = {
        "diffusers-unet": (UNet2DConditionModel, DiffusersUNetDenoiser),
        "sd3": (SD3Transformer2DModel, SD3Denoiser),
    }
    network, denoiser = kinds[description["family"]]
    with torch.device("meta"):
        untrained = network.from_config(description["network"])
    # outside: the noise schedule is made of numbers, not of shapes
    return denoiser(untrained, description["scheduler"], int(description["latent_size"]))
