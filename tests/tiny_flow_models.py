"""Tiny diffusers folders of today's flow transformers, each of its pipeline's own classes; latents 8x8, pictures 16x16."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from tests.tiny_models import save_index, save_parts, tiny_vae

CHAT_START, CHAT_END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
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


def tiny_qwen3(width: int, layers: int = 3) -> Qwen3Model:
    """Qwen3 with weights large enough that prompts differ."""
    config = Qwen3Config(
        vocab_size=len(_vocabulary()) + 3, hidden_size=width, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, initializer_range=0.3,
    )  # fmt: skip
    return Qwen3Model(config)


def save_qwen_tokenizer(path: Path) -> None:
    """Qwen's tokenizer over single bytes, with a chat template."""
    tokenizer: Any = Qwen2Tokenizer(
        vocab=_vocabulary(), merges=[], model_max_length=1024, chat_template=CHAT_TEMPLATE,
        extra_special_tokens=[CHAT_START, CHAT_END],
    )  # fmt: skip
    tokenizer.save_pretrained(path)


def _vocabulary() -> dict[str, int]:
    return {token: number for number, token in enumerate(sorted(ByteLevel.alphabet()))}
