"""FLUX.2's transformer as a Denoiser: flow prediction on straight paths, two streams that become one."""

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Want
from fewstep.diffusion.flow_shift import read_flow_shift
from fewstep.families.flow import FlowDenoiser
from fewstep.families.flux2_klein.packing import patches, whole
from fewstep.families.flux2_klein.shapes import LORA_TARGETS, empirical_mu


class Flux2KleinDenoiser(FlowDenoiser):
    """A `Flux2Transformer2DModel` without guidance as an input; its features are the image tokens after any block.

    All text tokens are read, those of the padding too, as the pipeline has it: there is no mask.

    Args:
        transformer: the network, with its own keys.
        scheduler_config: the model's `FlowMatchEulerDiscreteScheduler` config.
        latent_size: height and width of the latents.
        grid_steps: as `FlowDenoiser` has it.

    Raises:
        ValueError: a config that gives no schedule, guidance as an input, or latents the network cannot take.
    """

    family = "flux2-klein"

    def __init__(self, transformer: Any, scheduler_config: dict[str, Any], latent_size: int, grid_steps: int) -> None:
        config = transformer.config
        if config.guidance_embeds:
            raise ValueError(
                "its transformer takes guidance as an input (guidance_embeds), as guidance-distilled releases such as "
                "FLUX.2-dev do; of FLUX.2 the klein base models are teachers, black-forest-labs/FLUX.2-klein-base-4B and -9B"
            )
        if config.patch_size != 1 or config.in_channels % 4 or config.out_channels not in (None, config.in_channels):
            raise ValueError("its transformer does not take and give 2x2 patches of latents, one a token")
        shift = read_flow_shift(scheduler_config, empirical_mu)
        shape = (config.in_channels // 4, latent_size, latent_size)
        super().__init__(transformer, scheduler_config, shift, shape, 2, grid_steps)
        singles = range(len(transformer.single_transformer_blocks))
        self.lora_targets = (*LORA_TARGETS, *(f"single_transformer_blocks.{n}.attn.to_out" for n in singles))
        self.tap_shapes = ((transformer.inner_dim, latent_size // 2, latent_size // 2),) * len(self.blocks())
        self.middle = (len(self.blocks()) - 1) // 2

    def run_network(
        self, noisy: Tensor, level: Tensor, condition: Condition, want: Want
    ) -> tuple[Tensor | None, list[Tensor]]:
        net = self.network
        packed = patches(noisy)
        height, width = packed.shape[-2:]
        embed = net.time_guidance_embed
        time = embed.timestep_embedder(embed.time_proj(level * 1000).to(noisy.dtype))
        image = net.x_embedder(packed.flatten(2).transpose(1, 2))
        text = net.context_embedder(condition["text"])
        rope = net.pos_embed(_places(text.shape[1], height, width, noisy.device))
        of_image, of_text = net.double_stream_modulation_img(time), net.double_stream_modulation_txt(time)
        features: list[Tensor] = []
        for number, block in enumerate(net.transformer_blocks):
            text, image = self.run_block(block, image, text, of_image, of_text, rope)
            if self.reads(number, want):
                features.append(_map(image, height, width))
                if self.is_deepest(number, want):
                    return None, features
        tokens, of_both, start = torch.cat([text, image], 1), net.single_stream_modulation(time), text.shape[1]
        for number, block in enumerate(net.single_transformer_blocks, len(net.transformer_blocks)):
            tokens = self.run_block(block, tokens, None, of_both, rope)
            if self.reads(number, want):
                features.append(_map(tokens[:, start:], height, width))
                if self.is_deepest(number, want):
                    return None, features
        raw = net.proj_out(net.norm_out(tokens[:, start:], time))
        return whole(raw.transpose(1, 2).unflatten(2, (height, width))), features

    def blocks(self) -> list[nn.Module]:
        net = self.network
        return [*net.transformer_blocks, *net.single_transformer_blocks]


def _map(tokens: Tensor, height: int, width: int) -> Tensor:
    """Image tokens (B, N, D) as a map (B, D, height, width) that is no view: sharding hooks on it."""
    return tokens.transpose(1, 2).unflatten(2, (height, width)).clone()


def _places(num_text: int, height: int, width: int, device: torch.device) -> Tensor:
    """(N, 4) of text tokens, counted on the last axis, and of the image's patches behind them, row by row on axes 1 and 2."""
    none, rows, columns = (torch.arange(count, device=device) for count in (1, height, width))
    text = torch.cartesian_prod(none, none, none, torch.arange(num_text, device=device))
    return torch.cat([text, torch.cartesian_prod(none, rows, columns, none)])
