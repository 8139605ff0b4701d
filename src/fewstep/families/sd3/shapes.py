"""LoRA targets, released networks and VAE of Stable Diffusion 3 and 3.5 medium, as published in their configs."""

from typing import Any

LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj",
    "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip
# 2028.3 M parameters
SD3_MEDIUM: dict[str, Any] = {
    "family": "sd3", "latent_size": 128, "scheduler": {"num_train_timesteps": 1000, "shift": 3.0},
    "network": {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
        "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
    },
}  # fmt: skip
# 2243.2 M parameters; with its table of positions the 4.94 GB of the released file
SD35_MEDIUM: dict[str, Any] = {
    **SD3_MEDIUM,
    "network": {
        **SD3_MEDIUM["network"], "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
    },
}  # fmt: skip
SHAPES = {"sd3-medium": SD3_MEDIUM, "sd35-medium": SD35_MEDIUM}
# 84 M parameters, 8 pixels a latent side
VAE: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 16, "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2, "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
# beginnings of keys of single files
UNREAD_FILES = {"model.diffusion_model.joint_blocks.": "Stable Diffusion 3", "joint_blocks.": "Stable Diffusion 3"}
# name of a release with guidance built in: the model it was made from
DISTILLED_RELEASES = {
    "stable-diffusion-3.5-large-turbo": "stabilityai/stable-diffusion-3.5-large",
    "sd3.5-large-turbo": "stabilityai/stable-diffusion-3.5-large",
    "sd3.5-flash": "stabilityai/stable-diffusion-3.5-medium",
}
