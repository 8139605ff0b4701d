"""Z-Image's transformer as a Denoiser: flow prediction on straight paths, image and caption in one stream of tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Want
from fewstep.diffusion.flow_shift import read_flow_shift
from fewstep.families.flow import FlowDenoiser
from fewstep.families.z_image.shapes import LORA_TARGETS

_MULTIPLE = 32  # image and caption are padded to multiples of so many tokens, with a learned token each


class ZImageDenoiser(FlowDenoiser):
    """A `ZImageTransformer2DModel`; its features are the image tokens after any block behind the refiners, as a map.

    Its own forward takes lists of latents and of captions, each of its own length. Here the batch is one tensor: every
    caption is as wide as the longest one's padding, its own padding is the learned token, and what lies beyond is masked.
    The positions are the network's: caption tokens 1, 2, ... on the first axis, the image behind its caption's padding,
    padding tokens of the image at 0.

    Args:
        transformer: the network, with its own keys.
        scheduler_config: the model's `FlowMatchEulerDiscreteScheduler` config.
        latent_size: height and width of the latents.
        grid_steps: as `FlowDenoiser` has it.

    Raises:
        ValueError: a config that gives no schedule, other patches than 2x2, or latents the network cannot take.
    """

    family = "z-image"
    lora_targets = LORA_TARGETS

    def __init__(self, transformer: Any, scheduler_config: dict[str, Any], latent_size: int, grid_steps: int) -> None:
        config = transformer.config
        patches = (tuple(config.all_patch_size), tuple(config.all_f_patch_size))
        if patches != ((2,), (1,)):
            raise ValueError(f"patches {patches} are not supported; this network has patches of 2x2 in one frame")
        shape = (config.in_channels, latent_size, latent_size)
        shift = read_flow_shift(scheduler_config)
        super().__init__(transformer, scheduler_config, shift, shape, 2, grid_steps)
        self.max_latent_size = 2 * min(config.axes_lens[1:])
        if latent_size > self.max_latent_size:
            raise ValueError(
                f"latents of side {latent_size} do not fit this transformer: it has positions for sides up to "
                f"{self.max_latent_size} (teacher.resolution)"
            )
        self.tap_shapes = ((config.dim, latent_size // 2, latent_size // 2),) * len(transformer.layers)
        self.middle = (len(transformer.layers) - 1) // 2

    def run_network(
        self, noisy: Tensor, level: Tensor, condition: Condition, want: Want
    ) -> tuple[Tensor | None, list[Tensor]]:
        net = self.network
        height, width = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        time = net.t_embedder((1 - level) * net.t_scale).to(noisy.dtype)
        text, real, kept = _captions(condition)
        x = net.all_x_embedder["2-1"](_patches(noisy))
        x = torch.cat([x, net.x_pad_token.to(x.dtype).expand(len(x), -x.shape[1] % _MULTIPLE, -1)], 1)
        image_rope = self._rope(_image_places(height, width, x.shape[1], kept.sum(1)))
        for block in net.noise_refiner:
            x = self.run_block(block, x, None, image_rope, time)
        text = net.cap_embedder(text)
        text = torch.where(real.unsqueeze(-1), text, net.cap_pad_token.to(text.dtype))
        text_rope = self._rope(_caption_places(kept))
        for block in net.context_refiner:
            text = self.run_block(block, text, kept, text_rope)
        tokens, rope = torch.cat([x, text], 1), torch.cat([image_rope, text_rope], 1)
        mask = torch.cat([kept.new_ones(x.shape[:2]), kept], 1)
        features: list[Tensor] = []
        for number, block in enumerate(net.layers):
            tokens = self.run_block(block, tokens, mask, rope, time)
            if self.reads(number, want):
                image = tokens[:, : height * width].transpose(1, 2)
                features.append(image.unflatten(2, (height, width)).clone())  # no view: sharding hooks on it
                if self.is_deepest(number, want):
                    return None, features
        raw = net.all_final_layer["2-1"](tokens[:, : height * width], c=time)
        return -_image(raw, height, width), features  # the network predicts x0 - noise

    def _rope(self, places: Tensor) -> Tensor:
        """Rotations (B, N, D / 2) at places (B, N, 3)."""
        rotations: Tensor = self.network.rope_embedder(places.flatten(0, 1))
        return rotations.unflatten(0, places.shape[:2])

    def blocks(self) -> list[nn.Module]:
        net = self.network
        return [*net.noise_refiner, *net.context_refiner, *net.layers]


def _captions(condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
    """Text (B, N, D) with N a multiple of 32; which of its tokens are the caption's (B, N); and which it or its padding."""
    text, length = condition["text"], condition["text_length"]
    text = F.pad(text, (0, 0, 0, -text.shape[1] % _MULTIPLE))
    number = torch.arange(text.shape[1], device=text.device)
    padded = (length + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE
    return text, number < length.unsqueeze(1), number < padded.unsqueeze(1)


def _caption_places(kept: Tensor) -> Tensor:
    """(B, N, 3) of the tokens of captions (B, N): 1, 2, ... on the first axis."""
    first = torch.arange(1, kept.shape[1] + 1, device=kept.device).expand_as(kept)
    return torch.stack([first, torch.zeros_like(first), torch.zeros_like(first)], -1)


def _image_places(height: int, width: int, num_tokens: int, text_length: Tensor) -> Tensor:
    """(B, N, 3) of an image's patches, row by row behind captions of so many tokens (B,), and of its padding, all 0."""
    device, count = text_length.device, height * width
    number = torch.arange(num_tokens, device=device)
    grid = torch.stack([torch.ones_like(number), number // width, number % width], -1)
    grid = torch.where(number.unsqueeze(-1) < count, grid, 0).expand(len(text_length), -1, -1)
    return torch.cat([grid[..., :1] * (text_length + 1).view(-1, 1, 1), grid[..., 1:]], -1)


def _patches(latents: Tensor) -> Tensor:
    """Latents (B, C, 2 h, 2 w) as patches (B, h w, 4 C), channels innermost."""
    size, channels, height, width = latents.shape
    split = latents.reshape(size, channels, height // 2, 2, width // 2, 2)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(size, height * width // 4, 4 * channels)


def _image(patches: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `_patches`, (B, C, 2 height, 2 width)."""
    split = patches.unflatten(1, (height, width)).unflatten(3, (2, 2, -1))
    return split.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
