"""Tiny diffusers folders in the layouts of Stable Diffusion 1.x, 2.x, SDXL and SD 3; latents 8x8, pictures 16x16."""

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
)

MAX_TOKENS = 16
START, END = "<|startoftext|>", "<|endoftext|>"
_LETTERS = string.ascii_lowercase + string.digits + "!,.-'"
_MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "r e", "re d</w>"]  # cat, dog and red are one token each


def _vocabulary() -> dict[str, int]:
    tokens = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), *(m.replace(" ", "") for m in _MERGES), START, END]
    return {token: number for number, token in enumerate(tokens)}


def tiny_sd_folder(path: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """A Stable Diffusion 1.x folder: one text encoder of width 32."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        **_UNET, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=32,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2,
    )  # fmt: skip
    save_parts(path, unet=unet, vae=tiny_vae(0.18215), text_encoder=CLIPTextModel(_text_config()))
    DDIMScheduler(**_BETAS, prediction_type=prediction_type).save_pretrained(path / "scheduler")
    _save_tokenizer(path / "tokenizer", pad=END)
    save_index(
        path, "StableDiffusionPipeline", scheduler="DDIMScheduler", text_encoder="CLIPTextModel",
        tokenizer="CLIPTokenizer", unet="UNet2DConditionModel", vae="AutoencoderKL", safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return path


def tiny_sd2_folder(path: Path, *, seed: int = 0) -> Path:
    """A Stable Diffusion 2.x folder: OpenCLIP's gelu, linear projections, heads per block, v-prediction."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        **_UNET, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=32,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=(2, 4), use_linear_projection=True,
    )  # fmt: skip
    save_parts(path, unet=unet, vae=tiny_vae(0.18215), text_encoder=CLIPTextModel(_text_config(hidden_act="gelu")))
    DDIMScheduler(**_BETAS, prediction_type="v_prediction").save_pretrained(path / "scheduler")
    _save_tokenizer(path / "tokenizer", pad="!")
    save_index(
        path, "StableDiffusionPipeline", scheduler="DDIMScheduler", text_encoder="CLIPTextModel",
        tokenizer="CLIPTokenizer", unet="UNet2DConditionModel", vae="AutoencoderKL", safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return path


def tiny_sdxl_folder(path: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """An SDXL folder: two text encoders of width 32 (text width 64, pooled width 24) and time ids."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        **_UNET, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=64,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4), use_linear_projection=True,
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )  # fmt: skip
    save_parts(
        path, unet=unet, vae=tiny_vae(0.13025), text_encoder=CLIPTextModel(_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(projection_dim=24)),
    )  # fmt: skip
    DDIMScheduler(**_BETAS, prediction_type=prediction_type).save_pretrained(path / "scheduler")
    _save_tokenizer(path / "tokenizer", pad=END)
    _save_tokenizer(path / "tokenizer_2", pad="!")
    save_index(
        path, "StableDiffusionXLPipeline", scheduler="DDIMScheduler", text_encoder="CLIPTextModel",
        text_encoder_2="CLIPTextModelWithProjection", tokenizer="CLIPTokenizer", tokenizer_2="CLIPTokenizer",
        unet="UNet2DConditionModel", vae="AutoencoderKL", feature_extractor=None, image_encoder=None,
        force_zeros_for_empty_prompt=True,
    )  # fmt: skip
    return path


def tiny_sd3_folder(path: Path, *, seed: int = 0) -> Path:
    """An SD 3 folder without T5: three joint blocks, two text encoders, flow prediction with shift 3."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=48,
        pos_embed_max_size=8,
    )  # fmt: skip
    encoders = {
        name: CLIPTextModelWithProjection(_text_config(projection_dim=24))
        for name in ("text_encoder", "text_encoder_2")
    }
    save_parts(path, transformer=transformer, vae=tiny_vae(1.5305, shift_factor=0.0609), **encoders)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(path / "scheduler")
    _save_tokenizer(path / "tokenizer", pad=END)
    _save_tokenizer(path / "tokenizer_2", pad="!")
    save_index(
        path, "StableDiffusion3Pipeline", scheduler="FlowMatchEulerDiscreteScheduler",
        text_encoder="CLIPTextModelWithProjection", text_encoder_2="CLIPTextModelWithProjection", text_encoder_3=None,
        tokenizer="CLIPTokenizer", tokenizer_2="CLIPTokenizer", tokenizer_3=None,
        transformer="SD3Transformer2DModel", vae="AutoencoderKL", feature_extractor=None, image_encoder=None,
    )  # fmt: skip
    return path


def tiny_taesd_folder(path: Path, *, latent_channels: int = 4, blocks: int = 2, seed: int = 0) -> Path:
    """A TAESD whose latents' side is 2^(blocks - 1) times shorter than the picture's."""
    torch.manual_seed(seed)
    tiny = AutoencoderTiny(
        latent_channels=latent_channels, encoder_block_out_channels=(8,) * blocks, num_encoder_blocks=(1,) * blocks,
        decoder_block_out_channels=(8,) * blocks, num_decoder_blocks=(1,) * blocks,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in tiny.decoder.parameters():
            parameter.mul_(1.5)  # pictures with contrast
    tiny.save_pretrained(path, safe_serialization=True)
    return path


def tiny_clip_folder(path: Path, side: int = 24) -> Path:
    """A CLIP whose pictures have `side` pixels, with tokenizer and image processor."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=side, patch_size=8,
    )  # fmt: skip
    config = CLIPConfig(
        vision_config=vision.to_dict(), text_config=_text_config(projection_dim=20).to_dict(), projection_dim=20
    )
    CLIPModel(config).eval().save_pretrained(path, safe_serialization=True)
    _save_tokenizer(path, pad=END)
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    CLIPImageProcessorPil(**size).save_pretrained(path)
    return path


_UNET: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
    "norm_num_groups": 8,
}  # fmt: skip
_BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip


def tiny_vae(scaling_factor: float, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=scaling_factor, **options,
    )  # fmt: skip


def _text_config(**options: Any) -> CLIPTextConfig:
    vocabulary = _vocabulary()
    return CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS, bos_token_id=vocabulary[START], eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END], **options,
    )  # fmt: skip


def save_parts(path: Path, **parts: Any) -> None:
    for name, part in parts.items():
        part.eval().save_pretrained(path / name, safe_serialization=True)


def _save_tokenizer(path: Path, pad: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "vocab.json").write_text(json.dumps(_vocabulary()), encoding="utf-8")
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(_MERGES) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    (path / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def save_index(path: Path, pipeline: str, **parts: str | bool | None) -> None:
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.35.0"}
    for name, kind in parts.items():
        if kind is None:
            index[name] = [None, None]
        elif isinstance(kind, bool):
            index[name] = kind
        else:
            index[name] = ["transformers" if kind.startswith(("CLIP", "Qwen2", "Qwen3")) else "diffusers", kind]
    (path / "model_index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
