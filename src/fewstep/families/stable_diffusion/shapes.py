"""LoRA targets, released networks and the VAE of Stable Diffusion 1.5 and SDXL, as published in their configs."""

from typing import Any

# published for SDXL; the same names exist in 1.x and 2.x
LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip
# 859.5 M parameters
SD15: dict[str, Any] = {
    "family": "diffusers-unet", "latent_size": 64, "scheduler": SCHEDULER,
    "network": {
        "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
        "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8,
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    },
}  # fmt: skip
# SDXL base 1.0, 2567.5 M
SDXL: dict[str, Any] = {
    "family": "diffusers-unet", "latent_size": 128, "scheduler": SCHEDULER,
    "network": {
        "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
        "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
}  # fmt: skip
SHAPES, XL_SHAPES = {"sd15": SD15}, {"sdxl": SDXL}
# 84 M parameters, 8 pixels a latent side
VAE: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2, "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
# name of a release with guidance built in: the model it was made from
DISTILLED_RELEASES = {"sd-turbo": "stabilityai/stable-diffusion-2-1"}
XL_DISTILLED_RELEASES = dict.fromkeys(("sdxl-turbo", "sdxl-lightning"), "stabilityai/stable-diffusion-xl-base-1.0")
