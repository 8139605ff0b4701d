"""The networks of train_emoji_teacher.py in the shapes of Stable Diffusion and SDXL, and their diffusers folders."""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from emoji_teacher_data import MAX_TOKENS, RESOLUTION, Split
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fewstep.errors import UserError
from fewstep.formats.atomic import written_aside

LATENT_RESOLUTION, LATENT_CHANNELS = RESOLUTION // 4, 4
TIME_IDS = (RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION)  # SDXL: original size, crop corner, target size
NOISE_SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 1,
}  # fmt: skip


CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# A small emoji model in the shape of {family}

Makes 64x64 emoji from texts such as "grinning face, smileys & emotion". It is trained from scratch as a teacher for
trying out distillation, and opens with any diffusers:

    import diffusers
    pipeline = diffusers.{pipeline}.from_pretrained("this folder")
    pipeline("red apple, food & drink", num_inference_steps=30, guidance_scale=4).images[0]

- Parameters: {parts}; {steps} training steps in the last run; stored in float16.
- Data: the Noto Emoji pictures (Google, Apache-2.0) at 64x64 on white, with names and categories of the package
  emoji-datasource-google 16.0.0 (metadata MIT).
- Texts: {train} trained on, {held_out} held out with all of their pictures; split.json names both. Neither the
  autoencoder nor the tokenizer, the text encoder or the U-Net has seen the held-out ones.
- Weights: Apache-2.0.

Made with the example script of fewstep:

    {vae_command}
    {command}
"""


@dataclass(frozen=True)
class Sizes:
    """Widths and depths. The defaults are the models that ship; tests shrink them."""

    vae_channels: tuple[int, int, int] = (24, 32, 64)  # at 64x64, 32x32, 16x16
    vae_groups: int = 8
    unet_channels: tuple[int, int] = (64, 128)  # at 16x16 without attention, at 8x8 with it
    text_width: int = 128
    text_layers: int = 3
    first_text_width: int = 96  # SDXL only: as there, the first of two encoders is the smaller one
    first_text_layers: int = 2


def build_vae(sizes: Sizes) -> AutoencoderKL:
    """64x64 RGB to 4x16x16 latents and back."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=sizes.vae_channels, norm_num_groups=sizes.vae_groups, layers_per_block=1,
        latent_channels=LATENT_CHANNELS, sample_size=RESOLUTION,
    )  # fmt: skip
    with torch.no_grad():  # a posterior of standard deviation 0.08 instead of 1: noise would slow the beginning
        vae.quant_conv.bias[LATENT_CHANNELS:] = -5
    return vae


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    """A CLIP text encoder for this tokenizer, heads of 32."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
        num_hidden_layers=layers, num_attention_heads=width // 32, max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def enlarge_embeddings(encoder: nn.Module) -> None:
    """Token and position embeddings from standard deviation 0.02 to 0.1.

    SDXL reads hidden states before the last normalisation, where CLIP's start would give the U-Net almost nothing.
    """
    with torch.no_grad():
        for embedding in (module for module in encoder.modules() if isinstance(module, nn.Embedding)):
            embedding.weight.mul_(5)


@torch.no_grad()
def start_as_copy(unet: UNet2DConditionModel) -> None:
    """Let the untrained U-Net return its input: at high noise levels the input is nearly the noise that is asked for.

    Learning to copy alone would take a good part of a run this short. Each latent channel enters twice, with both
    signs, runs along the outermost skip connection, and leaves by silu(x) - silu(-x) = x.
    """
    last, width, copies = unet.up_blocks[-1].resnets[-1], unet.config.block_out_channels[0], 2 * LATENT_CHANNELS
    last.conv2.weight.zero_()
    last.conv2.bias.zero_()
    for convolution in (unet.conv_in, last.conv_shortcut, unet.conv_out):
        convolution.bias.zero_()
    unet.conv_in.weight[:copies] = 0
    last.conv_shortcut.weight[:copies] = 0
    unet.conv_out.weight.mul_(0.1)
    for row in range(copies):
        channel, sign = row // 2, 1 - 2 * (row % 2)
        unet.conv_in.weight[row, channel, 1, 1] = sign
        last.conv_shortcut.weight[row, last.conv_shortcut.in_channels - width + row] = 1
        unet.conv_out.weight[:, row] = 0
        unet.conv_out.weight[channel, row, 1, 1] = sign


def build_unet(sizes: Sizes, text_width: int, pooled_width: int | None) -> UNet2DConditionModel:
    """The text is read at 8x8 only (down, middle, up), which keeps a step fast."""
    extra = {}
    if pooled_width is not None:
        extra = {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 32, "use_linear_projection": True,
            "projection_class_embeddings_input_dim": pooled_width + 32 * len(TIME_IDS),
        }  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=LATENT_RESOLUTION, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=sizes.unet_channels, layers_per_block=1, cross_attention_dim=text_width,
        attention_head_dim=4, **extra,
    )  # fmt: skip  # attention_head_dim is the number of heads, as in Stable Diffusion's own configuration
    start_as_copy(unet)
    return unet


def build_networks(stage: str, sizes: Sizes, tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """What the stage "sd" or "sdxl" trains, under the names of the pipeline's folders."""
    config = text_config(tokenizer, sizes.text_width, sizes.text_layers)
    if stage == "sd":
        encoders = {"text_encoder": CLIPTextModel(config)}
        unet = build_unet(sizes, sizes.text_width, pooled_width=None)
    else:
        first = text_config(tokenizer, sizes.first_text_width, sizes.first_text_layers)
        encoders = {"text_encoder": CLIPTextModel(first), "text_encoder_2": CLIPTextModelWithProjection(config)}
        unet = build_unet(sizes, sizes.first_text_width + sizes.text_width, pooled_width=sizes.text_width)
    for encoder in encoders.values():
        enlarge_embeddings(encoder)
    return nn.ModuleDict({"unet": unet, **encoders})


def encode_text(networks: nn.ModuleDict, ids: Tensor, empty: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the U-Net reads of the captions, as the two pipelines compute it.

    Args:
        networks: from build_networks.
        ids: tokens (B, 24).
        empty: bool (B,), captions that are empty: SDXL replaces what it read of them by zeros.

    Returns:
        The states of the tokens (B, 24, text width), and for SDXL the pooled embedding (B, pooled width).
    """
    if "text_encoder_2" not in networks:
        return networks["text_encoder"](ids).last_hidden_state, None
    first = networks["text_encoder"](ids, output_hidden_states=True)
    second = networks["text_encoder_2"](ids, output_hidden_states=True)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return states.masked_fill(empty[:, None, None], 0), second.text_embeds.masked_fill(empty[:, None], 0)


def predict_noise(networks: nn.ModuleDict, noisy: Tensor, timesteps: Tensor, ids: Tensor, empty: Tensor) -> Tensor:
    """The noise in latents (B, 4, 16, 16) at `timesteps` (B,); ids and empty are those of encode_text."""
    states, pooled = encode_text(networks, ids, empty)
    added = {}
    if pooled is not None:
        time_ids = torch.tensor([TIME_IDS], dtype=noisy.dtype).expand(len(noisy), -1)
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}
    return networks["unet"](noisy, timesteps, states, **added).sample


def assemble(vae: AutoencoderKL, networks: nn.ModuleDict, tokenizer: CLIPTokenizer) -> DiffusionPipeline:
    """The pipeline of Stable Diffusion or of SDXL around these networks."""
    if "text_encoder_2" not in networks:
        scheduler = DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False)
        return StableDiffusionPipeline(
            vae=vae, **networks, tokenizer=tokenizer, scheduler=scheduler, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae, **networks, tokenizer=tokenizer, tokenizer_2=tokenizer, add_watermarker=False,
        scheduler=EulerDiscreteScheduler(**NOISE_SCHEDULE), force_zeros_for_empty_prompt=True,
    )  # fmt: skip


def save_folder(
    folder: Path, vae: AutoencoderKL, networks: nn.ModuleDict, tokenizer_folder: Path, split: Split, card: str
) -> None:
    """Write the pipeline in float16 with split.json and the card README.md; it appears whole or not at all."""
    halves = nn.ModuleDict({name: copy.deepcopy(network).half() for name, network in networks.items()})
    pipeline = assemble(copy.deepcopy(vae).half(), halves, CLIPTokenizer.from_pretrained(tokenizer_folder))
    with written_aside(folder) as aside:
        pipeline.save_pretrained(aside)
        for place in aside.glob("tokenizer*"):
            for name in ("vocab.json", "merges.txt"):
                shutil.copyfile(tokenizer_folder / name, place / name)
        # transformers opens a network in the type it was stored in, diffusers in float32: ask both for float32
        for path in aside.glob("text_encoder*/config.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2))
        (aside / "split.json").write_text(json.dumps(split, indent=1, ensure_ascii=False), encoding="utf-8")
        (aside / "README.md").write_text(card, encoding="utf-8")


def load_earlier(networks: nn.ModuleDict, folder: Path) -> list[str]:
    """Put the weights of an earlier run into the networks; returns the commands on its card that made them.

    Raises:
        UserError: there is no such run, or its networks have other sizes.
    """
    if not (folder / "README.md").is_file():
        raise UserError(f"{folder} has no model to train on: leave out --more")
    for name, network in networks.items():
        files = sorted((folder / name).glob("*.safetensors"))
        try:
            network.load_state_dict({key: value.float() for key, value in load_file(files[0]).items()})
        except (IndexError, RuntimeError) as error:
            raise UserError(f"{folder / name} does not hold this network: leave out --more") from error
    made = (folder / "README.md").read_text(encoding="utf-8").partition("Made with the example script of fewstep:")[2]
    return [line.strip() for line in made.splitlines() if "--stage vae" not in line and line.strip()]


def count_parameters(networks: dict[str, nn.Module] | nn.ModuleDict) -> str:
    """ "unet 3.98 M, text_encoder 0.87 M"."""
    sizes = {name: sum(parameter.numel() for parameter in network.parameters()) for name, network in networks.items()}
    return ", ".join(f"{name} {size / 1e6:.2f} M" for name, size in sizes.items())


def card_of(stage: str, commands: str, vae_command: str, steps: int, parts: str, split: Split) -> str:
    """The model card of a folder; `commands` made it, one a line."""
    family, pipeline = {
        "sd": ("Stable Diffusion", "StableDiffusionPipeline"),
        "sdxl": ("SDXL", "StableDiffusionXLPipeline"),
    }[stage]
    return CARD.format(
        family=family, pipeline=pipeline, parts=parts, steps=steps, command=commands, vae_command=vae_command,
        train=len(split["train"]), held_out=len(split["held_out"]),
    )  # fmt: skip
