"""Qwen-Image's transformer as a Denoiser: flow prediction on straight paths, image and caption in two streams."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Want
from fewstep.diffusion.flow_shift import read_flow_shift
from fewstep.families.flow import FlowDenoiser
from fewstep.families.qwen_image.shapes import LORA_TARGETS

_BASE = 10_000.0  # of the rotations' wavelengths


class QwenImageDenoiser(FlowDenoiser):
    """A `QwenImageTransformer2DModel`; its features are the image tokens after any block, as a map.

    A token is a 2x2 patch of latents. Captions are masked beyond their own tokens, as the pipeline has it.

    Args:
        transformer: the network, with its own keys.
        scheduler_config: the model's `FlowMatchEulerDiscreteScheduler` config.
        latent_size: height and width of the latents.
        grid_steps: as `FlowDenoiser` has it.

    Raises:
        ValueError: a config that gives no schedule, other patches than 2x2, or latents the network or the shift cannot take.
    """

    family = "qwen-image"
    lora_targets = LORA_TARGETS

    def __init__(self, transformer: Any, scheduler_config: dict[str, Any], latent_size: int, grid_steps: int) -> None:
        config = transformer.config
        if config.patch_size != 2 or config.in_channels % 4 or 4 * transformer.out_channels != config.in_channels:
            raise ValueError("its transformer does not take and give 2x2 patches of latents, one a token")
        if sum(config.axes_dims_rope) != config.attention_head_dim:
            raise ValueError(f"axes_dims_rope={list(config.axes_dims_rope)} do not add up to attention_head_dim")
        shape = (config.in_channels // 4, latent_size, latent_size)
        super().__init__(transformer, scheduler_config, read_flow_shift(scheduler_config), shape, 2, grid_steps)
        num_blocks = len(transformer.transformer_blocks)
        self.tap_shapes = ((transformer.inner_dim, latent_size // 2, latent_size // 2),) * num_blocks
        self.middle = (num_blocks - 1) // 2

    def run_network(
        self, noisy: Tensor, level: Tensor, condition: Condition, want: Want
    ) -> tuple[Tensor | None, list[Tensor]]:
        net = self.network
        packed = F.pixel_unshuffle(noisy, 2)  # the channels of one patch are c, then row, then column
        height, width = packed.shape[-2:]
        embed = net.time_text_embed
        time = embed.timestep_embedder(embed.time_proj(level).to(noisy.dtype))
        image = net.img_in(packed.flatten(2).transpose(1, 2))
        text = net.txt_in(net.txt_norm(condition["text"]))
        real = torch.arange(text.shape[1], device=text.device) < condition["text_length"].unsqueeze(1)
        rope = self._rope(height, width, text.shape[1], noisy.device)
        features: list[Tensor] = []
        for number, block in enumerate(net.transformer_blocks):
            text, image = self.run_block(block, image, text, real, time, rope)
            if self.reads(number, want):
                tokens = image.transpose(1, 2)
                features.append(tokens.unflatten(2, (height, width)).clone())  # no view: sharding hooks on it
                if self.is_deepest(number, want):
                    return None, features
        raw = net.proj_out(net.norm_out(image, time))
        return F.pixel_shuffle(raw.transpose(1, 2).unflatten(2, (height, width)), 2), features

    def combine(self, unconditional: Tensor, conditional: Tensor, noisy: Tensor, guidance_scale: float) -> Tensor:
        """As the contract's, then each token's velocity at the norm that it has in the conditional branch."""
        guided = super().combine(unconditional, conditional, noisy, guidance_scale)
        plain, strong = (F.pixel_unshuffle(noisy - x0, 2) for x0 in (conditional, guided))  # sigma times the velocity
        norms = [torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in (plain, strong)]
        ratio = norms[0] / norms[1].clamp(min=torch.finfo(strong.dtype).tiny)
        return noisy - F.pixel_shuffle(ratio * strong, 2)

    def _rope(self, height: int, width: int, num_text: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rotations (N, head / 2), complex, of the image's patches, counted from its middle, and of text tokens behind its edge.

        The network keeps a table of them outside of its state; worked out here they need none.
        """
        rows, columns = (torch.arange(count, device=device) - (count - count // 2) for count in (height, width))
        behind = max(height // 2, width // 2) + torch.arange(num_text, device=device)
        image = torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns)
        places = (image, behind.unsqueeze(1).expand(-1, 3))
        turns = [_BASE ** -(torch.arange(0, n, 2, device=device) / n) for n in self.network.config.axes_dims_rope]
        angles = (torch.cat([at[:, axis : axis + 1] * turns[axis] for axis in range(3)], 1) for at in places)
        of_image, of_text = (torch.polar(torch.ones_like(angle), angle) for angle in angles)
        return of_image, of_text

    def blocks(self) -> list[nn.Module]:
        return list(self.network.transformer_blocks)
