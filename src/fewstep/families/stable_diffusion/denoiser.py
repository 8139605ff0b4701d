"""Stable Diffusion 1.x, 2.x and SDXL U-Nets as Denoisers."""

from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Want
from fewstep.diffusion.schedules import DiscreteSchedule
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.families.prediction import Prediction
from fewstep.families.stable_diffusion.schedule import discrete_alphas_cumprod
from fewstep.families.stable_diffusion.shapes import LORA_TARGETS


class DiffusersUNetDenoiser(DiffusersDenoiser):
    """A `UNet2DConditionModel`; its features are the outputs of its down, mid and up blocks.

    Args:
        unet: the network, with its own keys.
        scheduler_config: the model's scheduler config: betas and prediction type are read from it.
        latent_size: height and width of the latents; 0 takes the network's `sample_size`.

    Raises:
        ValueError: a prediction type or conditioning this library does not know.
    """

    family = "diffusers-unet"
    lora_targets = LORA_TARGETS

    def __init__(self, unet: Any, scheduler_config: dict[str, Any], latent_size: int = 0) -> None:
        config = unet.config
        _refuse_other_kinds(config)
        size = latent_size or config.sample_size
        if not size:
            raise ValueError("its unet does not say the side of its latents (sample_size in its config.json)")
        prediction = scheduler_config.get("prediction_type", "epsilon")
        if prediction not in get_args(Prediction) or prediction == "flow":
            raise ValueError(
                f"the scheduler's prediction_type={prediction!r} is not supported; epsilon and v_prediction are"
            )
        schedule = DiscreteSchedule(discrete_alphas_cumprod(scheduler_config))
        super().__init__(
            unet, scheduler_config, schedule, cast(Prediction, prediction), (config.in_channels, size, size)
        )
        self.latent_multiple, self.max_latent_size = 2 ** (len(config.down_block_types) - 1), 0
        widths, last, sides = config.block_out_channels, len(config.down_block_types) - 1, [size]
        for _ in range(last):
            sides.append(-(-sides[-1] // 2))
        down = [(width, sides[min(level + 1, last)]) for level, width in enumerate(widths)]
        up = [(width, sides[max(level - 1, 0)]) for level, width in reversed(list(enumerate(widths)))]
        self.tap_shapes = tuple((width, side, side) for width, side in (*down, (widths[-1], sides[-1]), *up))
        self.middle = len(down)
        self.has_time_ids = config.addition_embed_type == "text_time"

    def run_network(
        self, noisy: Tensor, level: Tensor, condition: Condition, want: Want
    ) -> tuple[Tensor | None, list[Tensor]]:
        """As the network's own forward; what can be tapped are its down blocks, its mid block and its up blocks."""
        unet, text = self.network, condition["text"]
        embedding = unet.time_embedding(unet.get_time_embed(noisy, level))
        if self.has_time_ids:
            added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]}
            embedding = embedding + unet.get_aug_embed(embedding, text, added)
        skips = [unet.conv_in(noisy)]
        x, features = skips[0], list[Tensor]()
        blocks: list[Any] = self.blocks()
        for place, block in enumerate(blocks):
            given = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
            if place < self.middle:
                x, outputs = block(x, embedding, **given)
                skips += outputs
                del outputs  # or it would outlive the decoder
            elif place == self.middle:
                x = block(x, embedding, **given)
            else:
                own = tuple(skips.pop() for _ in block.resnets)[::-1]
                x = block(x, own, embedding, upsample_size=self._upsample_size(place, skips, noisy), **given)
            if self.reads(place, want):
                features.append(x)
                if self.is_deepest(place, want):
                    return None, features
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(x))), features

    def _upsample_size(self, place: int, skips: list[Tensor], noisy: Tensor) -> torch.Size | None:
        """What the last up block, and each where no side is uneven, find out themselves."""
        uneven = any(side % 2**self.network.num_upsamplers for side in noisy.shape[-2:])
        return skips[-1].shape[2:] if uneven and place < len(self.tap_shapes) - 1 else None

    def blocks(self) -> list[nn.Module]:
        return [*self.network.down_blocks, self.network.mid_block, *self.network.up_blocks]

    def sharded_parts(self) -> list[nn.Module]:
        """A block of SDXL is up to a third of the network, so its layers come first; what is left of it is small."""
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D

        layers = (ResnetBlock2D, BasicTransformerBlock)
        inner = [part for block in self.blocks() for part in block.modules() if isinstance(part, layers)]
        return [*inner, *self.blocks()]


_REASONS = {
    "out_channels": " (an inpainting model has more input channels than it predicts)",
    "time_cond_proj_dim": " (this one takes its guidance as an input: give the model it was distilled from)",
}


def _refuse_other_kinds(config: Any) -> None:
    """Raise ValueError for U-Nets whose own forward does more than `run_network`: nothing may be left out silently."""
    expected = {
        "addition_embed_type": (None, "text_time"), "class_embed_type": (None,), "num_class_embeds": (None,), "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,),
        "time_embedding_act_fn": (None,), "time_cond_proj_dim": (None,), "center_input_sample": (None, False),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
        "out_channels": (config.in_channels,),
    }  # fmt: skip
    width = config.cross_attention_dim
    if isinstance(width, list | tuple) and len(set(width)) != 1:
        raise ValueError(
            f"U-Nets with cross_attention_dim={list(width)} are not supported: one text is read by every block"
        )
    for name, allowed in expected.items():
        if config.get(name) not in allowed:
            raise ValueError(
                f"U-Nets with {name}={config.get(name)!r} are not supported; Stable Diffusion 1.x, 2.x and SDXL are"
                + _REASONS.get(name, "")
            )
