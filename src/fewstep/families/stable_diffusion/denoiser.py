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
    """A `UNet2DConditionModel`; its bottleneck is the output of the mid block.

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
        for _ in config.down_block_types[:-1]:
            size = -(-size // 2)
        self.bottleneck_shape = (config.block_out_channels[-1], size, size)
        self.has_time_ids = config.addition_embed_type == "text_time"

    def run_network(
        self, noisy: Tensor, level: Tensor, condition: Condition, want: Want
    ) -> tuple[Tensor | None, Tensor | None]:
        feature, skips, embedding = self._encode(noisy, level, condition)
        if want == "bottleneck":
            return None, feature
        raw = self._decode(feature, skips, embedding, condition["text"], noisy.shape[-2:])
        return raw, feature if want == "both" else None

    def _encode(self, noisy: Tensor, level: Tensor, condition: Condition) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Mid-block output, skip tensors and time embedding, as the network's own forward makes them."""
        unet, text = self.network, condition["text"]
        embedding = unet.time_embedding(unet.get_time_embed(noisy, level))
        if self.has_time_ids:
            added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]}
            embedding = embedding + unet.get_aug_embed(embedding, text, added)
        x = unet.conv_in(noisy)
        skips: tuple[Tensor, ...] = (x,)
        for block in unet.down_blocks:
            if getattr(block, "has_cross_attention", False):
                x, outputs = block(x, embedding, encoder_hidden_states=text)
            else:
                x, outputs = block(x, embedding)
            skips += outputs
        if getattr(unet.mid_block, "has_cross_attention", False):
            return unet.mid_block(x, embedding, encoder_hidden_states=text), skips, embedding
        return unet.mid_block(x, embedding), skips, embedding

    def _decode(
        self, x: Tensor, skips: tuple[Tensor, ...], embedding: Tensor, text: Tensor, size: torch.Size
    ) -> Tensor:
        unet = self.network
        uneven = any(side % 2**unet.num_upsamplers for side in size)
        for number, block in enumerate(unet.up_blocks):
            own, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            last = number == len(unet.up_blocks) - 1
            target = skips[-1].shape[2:] if uneven and not last else None
            if getattr(block, "has_cross_attention", False):
                x = block(x, own, embedding, encoder_hidden_states=text, upsample_size=target)
            else:
                x = block(x, own, embedding, upsample_size=target)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))

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
