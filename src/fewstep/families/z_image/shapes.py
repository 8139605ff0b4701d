"""LoRA targets, released network and VAE of Z-Image, names and files of its releases."""

from typing import Any

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
# 6154.9 M parameters: the defaults of diffusers' class; shift 6 is the base's, 3 Turbo's
Z_IMAGE: dict[str, Any] = {
    "family": "z-image", "latent_size": 128, "scheduler": {"num_train_timesteps": 1000, "shift": 6.0},
    "network": {
        "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 3840, "n_layers": 30,
        "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 2560,
        "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": (32, 48, 48), "axes_lens": (1024, 512, 512),
    },
}  # fmt: skip
SHAPES = {"z-image": Z_IMAGE}
# 84 M parameters, 8 pixels a latent side
VAE: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 16, "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2, "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
# beginnings of keys of single files
UNREAD_FILES = {
    f"{prefix}{part}.": "Z-Image"
    for prefix in ("model.diffusion_model.", "")
    for part in ("cap_embedder", "context_refiner")
}
GUIDANCE_OFF = {"guidance_scale": 0}  # g of pos + g (pos - neg)
# name of a release with guidance built in: the model it was made from
DISTILLED_RELEASES = {"z-image-turbo": "Tongyi-MAI/Z-Image"}
