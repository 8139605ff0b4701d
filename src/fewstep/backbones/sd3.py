"""Stable Diffusion 3's transformer as a Denoiser: flow prediction on straight paths."""

from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from fewstep.backbones.diffusers_denoiser import DiffusersDenoiser
from fewstep.backbones.diffusers_unet import plain_config
from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Want
from fewstep.diffusion.noise_levels import FlowSchedule


class SD3Denoiser(DiffusersDenoiser):
    """An `SD3Transformer2DModel`; its bottleneck is the image tokens after the middle block, as a map.

    Source: Esser et al. 2024 (arXiv:2403.03206).

    Args:
        transformer: the network, with its own keys.
        scheduler_config: the model's `FlowMatchEulerDiscreteScheduler` config (shift, num_train_timesteps).
        latent_size: height and width of the latents; 0 takes the network's `sample_size`.

    Raises:
        ValueError: the scheduler shifts its times dynamically, which has no fixed grid.
    """

    family = "sd3"
    network: Any  # diffusers models carry no types

    def __init__(self, transformer: Any, scheduler_config: dict[str, Any], latent_size: int = 0) -> None:
        config = transformer.config
        if scheduler_config.get("use_dynamic_shifting"):
            raise ValueError("schedulers with use_dynamic_shifting have no fixed grid of levels and are not supported")
        size = latent_size or config.sample_size
        levels = int(scheduler_config.get("num_train_timesteps", 1000))
        schedule = FlowSchedule(float(scheduler_config.get("shift", 1.0)), levels)
        super().__init__(transformer, schedule, "flow", (config.in_channels, size, size))
        self.scheduler_config = dict(scheduler_config)
        side = size // config.patch_size
        self.bottleneck_shape = (config.num_attention_heads * config.attention_head_dim, side, side)
        self.middle = (len(transformer.transformer_blocks) - 1) // 2

    def run_network(
        self, noisy: Tensor, level: Tensor, condition: Condition, want: Want
    ) -> tuple[Tensor | None, Tensor | None]:
        if condition.text is None or condition.pooled is None:
            raise ValueError("this transformer needs text embeddings and pooled embeddings")
        net = self.network
        x = net.pos_embed(noisy)
        embedding = net.time_text_embed(level * self.noise_schedule.num_levels, condition.pooled)
        context = net.context_embedder(condition.text)
        feature: Tensor | None = None
        for number, block in enumerate(net.transformer_blocks):
            if torch.is_grad_enabled() and net.gradient_checkpointing:
                context, x = net._gradient_checkpointing_func(block, x, context, embedding)
            else:
                context, x = block(x, context, embedding)
            if number == self.middle and want != "x0":
                feature = x.transpose(1, 2).unflatten(2, self.bottleneck_shape[1:])
                if want == "bottleneck":
                    return None, feature
        return self._image(net.proj_out(net.norm_out(x, embedding))), feature

    def _image(self, tokens: Tensor) -> Tensor:
        """Patches (B, h w, p p C) back to (B, C, H, W)."""
        side, patch = self.bottleneck_shape[1], self.network.config.patch_size
        patches = tokens.reshape(len(tokens), side, side, patch, patch, -1)
        return torch.einsum("bhwpqc->bchpwq", patches).reshape(len(tokens), -1, side * patch, side * patch)

    def describe(self) -> dict[str, Any]:
        return {
            "family": self.family, "network": plain_config(self.network.config), "scheduler": self.scheduler_config,
            "latent_size": self.image_shape[1],
        }  # fmt: skip

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "SD3Denoiser":
        """Build an untrained model from `describe`'s dict."""
        transformer = SD3Transformer2DModel.from_config(description["network"])
        return cls(transformer, description["scheduler"], int(description["latent_size"]))
