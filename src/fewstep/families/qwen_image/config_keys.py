"""Which configs of networks and VAEs are understood here."""

from fewstep.families.config_keys import KnownKeys

VAE_READ = ("latents_mean", "latents_std")
NETWORK_KEYS = KnownKeys(
    classes=("QwenImageTransformer2DModel",),
    # zero_cond_t, use_additional_t_cond and use_layer3d_rope, of the variants that read pictures too, and guidance_embeds
    # are refused unless they are false
    read=(
        "patch_size", "in_channels", "out_channels", "num_layers", "attention_head_dim", "num_attention_heads",
        "joint_attention_dim", "axes_dims_rope",
    ),
    elsewhere=("pooled_projection_dim",),  # in released configs; no layer was ever built from it
)  # fmt: skip
VAE_KEYS = KnownKeys(
    classes=("AutoencoderKLQwenImage",),
    # input_channels is refused unless it is 3
    read=("base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample", *VAE_READ),
    elsewhere=("dropout", "sample_size"),  # of its training; the side of its pictures, where a folder says it
)
