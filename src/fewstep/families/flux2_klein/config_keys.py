"""Which configs of networks and VAEs are understood here."""

from fewstep.families.config_keys import KnownKeys

NETWORK_KEYS = KnownKeys(
    classes=("Flux2Transformer2DModel",),
    read=(
        "patch_size", "in_channels", "out_channels", "num_layers", "num_single_layers", "attention_head_dim",
        "num_attention_heads", "joint_attention_dim", "timestep_guidance_channels", "mlp_ratio", "axes_dims_rope",
        "rope_theta", "eps", "guidance_embeds",
    ),
)  # fmt: skip
VAE_KEYS = KnownKeys(
    classes=("AutoencoderKLFlux2",),
    # patch_size is refused unless it is 2x2
    read=(
        "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
        "decoder_block_out_channels", "layers_per_block", "act_fn", "latent_channels", "norm_num_groups",
        "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention", "batch_norm_eps",
    ),
    # tiling; of its training; of other VAEs, which the stock pipeline does not read
    elsewhere=("sample_size", "batch_norm_momentum", "force_upcast", "scaling_factor", "shift_factor"),
)  # fmt: skip
