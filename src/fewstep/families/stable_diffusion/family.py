"""Stable Diffusion 1.x and 2.x, and XL: U-Nets that predict epsilon or v on a discrete schedule."""

from typing import Any

import torch

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.schedules import StepSchedule
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.families.diffusers_family import DiffusersFamily
from fewstep.families.stable_diffusion.shapes import LORA_TARGETS, SHAPES, VAE, XL_SHAPES

_TOKENS = 77  # of CLIP


class StableDiffusion(DiffusersFamily):
    """Stable Diffusion 1.x and 2.x: one CLIP text encoder."""

    name = "sd"
    title = "Stable Diffusion 1.x or 2.x"
    description_name = "diffusers-unet"
    component = "unet"
    network_class = "UNet2DConditionModel"
    scheduler_class = "LCMScheduler"
    lora_targets = LORA_TARGETS
    shapes = SHAPES
    autoencoder_config = VAE

    def has_network(self, config: dict[str, Any]) -> bool:
        return config.get("addition_embed_type") != "text_time"

    def build_around(self, network: Any, scheduler: dict[str, Any], latent_size: int) -> DiffusersDenoiser:
        from fewstep.families.stable_diffusion.denoiser import DiffusersUNetDenoiser

        return DiffusersUNetDenoiser(network, scheduler, latent_size)

    def example_condition(self, denoiser: Denoiser, size: int) -> Condition:
        network: Any = denoiser.network
        config = network.config
        text = torch.zeros(size, _TOKENS, config.cross_attention_dim)
        return Condition(size, {"text": text}, {"text": text[:1]})

    def few_step_scheduler(self, denoiser: Denoiser, steps: StepSchedule) -> Any:
        from fewstep.families.stable_diffusion.few_step_scheduler import build_few_step_scheduler

        return build_few_step_scheduler(denoiser, steps)


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, a pooled embedding and the picture's size as time ids."""

    name = "sdxl"
    title = "SDXL"
    shapes = XL_SHAPES

    def has_network(self, config: dict[str, Any]) -> bool:
        return config.get("addition_embed_type") == "text_time"

    def example_condition(self, denoiser: Denoiser, size: int) -> Condition:
        network: Any = denoiser.network
        config = network.config
        text = torch.zeros(size, _TOKENS, config.cross_attention_dim)
        pooled = torch.zeros(size, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
        parts = {"text": text, "pooled": pooled, "time_ids": torch.zeros(size, 6)}
        return Condition(size, parts, {"text": text[:1], "pooled": pooled[:1], "time_ids": "same"})
