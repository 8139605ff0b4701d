"""LoRA targets, released network and VAE of Qwen-Image, and names of its releases."""

from typing import Any

LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
)  # fmt: skip
# 20,430 M parameters: the defaults of diffusers' class
QWEN_IMAGE: dict[str, Any] = {
    "family": "qwen-image", "latent_size": 128,
    "scheduler": {
        "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9,
        "base_image_seq_len": 256, "max_image_seq_len": 8192, "time_shift_type": "exponential", "shift_terminal": 0.02,
    },
    "network": {
        "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56),
    },
}  # fmt: skip
SHAPES = {"qwen-image": QWEN_IMAGE}
# 127 M parameters; convolutions over frames too, 8 pixels a latent side
VAE: dict[str, Any] = {
    "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
}  # fmt: skip
# beginnings of keys of single files
UNREAD_FILES = {
    f"{prefix}{part}": "Qwen-Image"
    for prefix in ("model.diffusion_model.", "")
    for part in ("transformer_blocks.0.img_mod.", "txt_norm.")
}
GUIDANCE_OFF = {"true_cfg_scale": 1}
_BASE = "Qwen/Qwen-Image or Qwen/Qwen-Image-2512"
# name of a release with guidance built in: the model it was made from
DISTILLED_RELEASES = {
    "qwen-image-lightning": "Qwen/Qwen-Image",
    "qwen-image-2512-lightning": "Qwen/Qwen-Image-2512",
    "qwen-image-distill": "Qwen/Qwen-Image",
    "qwen-image-turbo": _BASE,
    "qwen-image-2512-turbo": "Qwen/Qwen-Image-2512",
    "qwen-image-flash": _BASE,
    "qwen-image-fast": _BASE,
}
