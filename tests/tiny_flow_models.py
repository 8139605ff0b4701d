"""Tiny diffusers folders of today's flow transformers, each of its pipeline's own classes; latents 8x8, pictures 16x16."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from tests.tiny_models import save_index, save_parts, tiny_vae

CHAT_START, CHAT_END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
# what QwenImagePipeline puts before a prompt: 34 tokens with these as one token each, as in the real tokenizer
TEMPLATE_WORDS = (
    "system", "\n", "Describe", " the", " image", " by", " detailing", " color", " shape", " size", " texture",
    " quantity", " text", " spatial", " relationships", " of", " objects", " and", " background", "user", "assistant",
)  # fmt: skip
# as Qwen3's own ends, where thinking is switched off
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tiny_z_image_folder(path: Path, *, seed: int = 0, **scheduler: Any) -> Path:
    """A Z-Image folder: three layers of width 32 beside one refiner each, Qwen3 of three layers, shift 3."""
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
        axes_dims=[4, 6, 6], axes_lens=[1024, 32, 32],
    )  # fmt: skip
    with torch.no_grad():
        for name in ("x_pad_token", "cap_pad_token"):
            getattr(transformer, name).normal_()  # zeros at first
    save_parts(path, transformer=transformer, vae=tiny_vae(0.3611, shift_factor=0.1159), text_encoder=tiny_qwen3(24))
    save_qwen_tokenizer(path / "tokenizer")
    FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}).save_pretrained(path / "scheduler")
    save_index(
        path, "ZImagePipeline", scheduler="FlowMatchEulerDiscreteScheduler", text_encoder="Qwen3Model",
        tokenizer="Qwen2Tokenizer", transformer="ZImageTransformer2DModel", vae="AutoencoderKL",
    )  # fmt: skip
    return path


def tiny_flux2_klein_folder(path: Path, *, seed: int = 0, is_distilled: bool = False, **scheduler: Any) -> Path:
    """A FLUX.2 klein folder: two double and three single blocks of width 32, Qwen3 of the 28 layers that are read, dynamic shift."""
    torch.manual_seed(seed)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    with torch.no_grad():
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.3, 2.0)
    encoder = Qwen3ForCausalLM(_qwen3_config(8, layers=28, heads=1))
    save_parts(path, transformer=transformer, vae=vae, text_encoder=encoder)
    save_qwen_tokenizer(path / "tokenizer")
    shift = {"shift": 3.0, "use_dynamic_shifting": True, **scheduler}
    FlowMatchEulerDiscreteScheduler(**shift).save_pretrained(path / "scheduler")
    save_index(
        path, "Flux2KleinPipeline", scheduler="FlowMatchEulerDiscreteScheduler", text_encoder="Qwen3ForCausalLM",
        tokenizer="Qwen2Tokenizer", transformer="Flux2Transformer2DModel", vae="AutoencoderKLFlux2",
        is_distilled=is_distilled,
    )  # fmt: skip
    return path


def tiny_qwen_image_folder(path: Path, *, seed: int = 0, **scheduler: Any) -> Path:
    """A Qwen-Image folder: three blocks of width 32, Qwen2.5-VL of two layers, a VAE of videos, dynamic shift with a terminal."""
    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[-0.7, 0.1, 1.5, 0.2], latents_std=[2.8, 1.4, 0.6, 1.1],
    )  # fmt: skip
    save_parts(path, transformer=transformer, vae=vae, text_encoder=_tiny_qwen_vl())
    config = json.loads((path / "vae/config.json").read_text())
    (path / "vae/config.json").write_text(json.dumps({**config, "sample_size": 16}))
    config = json.loads((path / "transformer/config.json").read_text())  # with what released folders say besides
    (path / "transformer/config.json").write_text(json.dumps({**config, "pooled_projection_dim": 768}))
    save_qwen_tokenizer(path / "tokenizer", TEMPLATE_WORDS)
    shift = {
        "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256,
        "max_image_seq_len": 8192, "shift_terminal": 0.02, **scheduler,
    }  # fmt: skip
    FlowMatchEulerDiscreteScheduler(**shift).save_pretrained(path / "scheduler")
    save_index(
        path, "QwenImagePipeline", scheduler="FlowMatchEulerDiscreteScheduler", tokenizer="Qwen2Tokenizer",
        text_encoder="Qwen2_5_VLForConditionalGeneration", transformer="QwenImageTransformer2DModel",
        vae="AutoencoderKLQwenImage",
    )  # fmt: skip
    return path


def _tiny_qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL of two layers with weights large enough that prompts differ; its part for pictures stays idle."""
    text = {
        "vocab_size": len(_vocabulary()) + 3 + len(TEMPLATE_WORDS), "hidden_size": 24, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1200,
        "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 8, "out_hidden_size": 24, "intermediate_size": 8, "num_heads": 2,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def klein_latents(noise: Tensor) -> Tensor:
    """Noise (B, C, 2 h, 2 w) as the pipeline takes `latents`, (B, 4 C, h, w)."""
    return torch.nn.functional.pixel_unshuffle(noise, 2)


def klein_tokens(noise: Tensor) -> Tensor:
    """Noise (B, C, 2 h, 2 w) as its scheduler sees latents, (B, h w, 4 C)."""
    return klein_latents(noise).flatten(2).transpose(1, 2)


def tiny_qwen3(width: int, layers: int = 3) -> Qwen3Model:
    """Qwen3 with weights large enough that prompts differ."""
    return Qwen3Model(_qwen3_config(width, layers, heads=4))


def _qwen3_config(width: int, layers: int, heads: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(_vocabulary()) + 3, hidden_size=width, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=(heads + 1) // 2, head_dim=8, max_position_embeddings=1024,
        initializer_range=0.3,
    )  # fmt: skip


def save_qwen_tokenizer(path: Path, words: tuple[str, ...] = ()) -> None:
    """Qwen's tokenizer over single bytes, and whole `words`, with a chat template."""
    tokenizer: Any = Qwen2Tokenizer(
        vocab=_vocabulary(), merges=[], model_max_length=1024, chat_template=CHAT_TEMPLATE,
        extra_special_tokens=[CHAT_START, CHAT_END],
    )  # fmt: skip
    tokenizer.add_tokens(list(words))
    tokenizer.save_pretrained(path)


def _vocabulary() -> dict[str, int]:
    return {token: number for number, token in enumerate(sorted(ByteLevel.alphabet()))}
