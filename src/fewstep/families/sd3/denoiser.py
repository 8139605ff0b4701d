"""Stable Diffusion 3's transformer as a Denoiser: flow prediction on straight paths."""

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Want
from fewstep.diffusion.schedules import FlowSchedule
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.families.sd3.shapes import LORA_TARGETS


class SD3Denoiser(DiffusersDenoiser):
    """An `SD3Transformer2DModel`; its features are the image tokens after any block, as a map.

    Source: Esser et al. 2024 (arXiv:2403.03206).

    Args:
        transformer: the network, with its own keys.
        scheduler_config: the model's `FlowMatchEulerDiscreteScheduler` config (shift, num_train_timesteps).
        latent_size: height and width of the latents; 0 takes the network's `sample_size`.

    Raises:
        ValueError: scheduler options that change the grid, or a latent size the network cannot take.
    """

    family = "sd3"
    lora_targets = LORA_TARGETS

    def __init__(self, transformer: Any, scheduler_config: dict[str, Any], latent_size: int = 0) -> None:
        config = transformer.config
        others = (
            "use_dynamic_shifting",
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "invert_sigmas",
            "shift_terminal",
        )
        for name in others:
            if scheduler_config.get(name):
                raise ValueError(
                    f"schedulers with {name} are not supported: the grid of levels follows from `shift` alone"
                )
        size = latent_size or config.sample_size
        if size % config.patch_size or size > config.patch_size * config.pos_embed_max_size:
            raise ValueError(
                f"latents of side {size} do not fit this transformer: it takes multiples of its patch size {config.patch_size} up to "
                f"{config.patch_size * config.pos_embed_max_size} (teacher.resolution)"
            )
        levels = int(scheduler_config.get("num_train_timesteps", 1000))
        shift = float(scheduler_config.get("shift", 1.0))
        if not 0 < shift < 1e6:
            raise ValueError(f"the scheduler's shift={shift:g} gives no noise schedule; SD 3 has 3")
        schedule = FlowSchedule(shift, levels)
        super().__init__(transformer, scheduler_config, schedule, "flow", (config.in_channels, size, size))
        self.latent_multiple = config.patch_size
        self.max_latent_size = config.patch_size * config.pos_embed_max_size
        side = size // config.patch_size
        shape = (config.num_attention_heads * config.attention_head_dim, side, side)
        self.tap_shapes = (shape,) * len(transformer.transformer_blocks)
        self.middle = (len(transformer.transformer_blocks) - 1) // 2

    def run_network(
        self, noisy: Tensor, level: Tensor, condition: Condition, want: Want
    ) -> tuple[Tensor | None, list[Tensor]]:
        net = self.network
        height, width = (side // net.config.patch_size for side in noisy.shape[-2:])
        x = net.pos_embed(noisy)
        embedding = net.time_text_embed(level * self.noise_schedule.num_levels, condition["pooled"])
        context = net.context_embedder(condition["text"])
        features: list[Tensor] = []
        for number, block in enumerate(net.transformer_blocks):
            context, x = self.run_block(block, x, context, embedding)
            if self.reads(number, want):
                image = x.transpose(1, 2)
                features.append(image.unflatten(2, (height, width)).clone())  # no view: sharding hooks on it
                if self.is_deepest(number, want):
                    return None, features
        return self._image(net.proj_out(net.norm_out(x, embedding)), height, width), features

    def _image(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Patches (B, h w, p p C) back to (B, C, h p, w p)."""
        patch = self.network.config.patch_size
        patches = tokens.reshape(len(tokens), height, width, patch, patch, -1)
        return torch.einsum("bhwpqc->bchpwq", patches).reshape(len(tokens), -1, height * patch, width * patch)

    def blocks(self) -> list[nn.Module]:
        return list(self.network.transformer_blocks)
