"""Which configs of schedulers and VAEs are understood here."""

from fewstep.families.config_keys import KnownKeys

SCHEDULER_KEYS = KnownKeys(
    classes=("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"),
    read=("num_train_timesteps", "shift"),
    # the last ones only with options that are refused when they are on; stochastic sampling is the stock sampler's
    elsewhere=(
        "stochastic_sampling", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type",
        "scale_factors", "upscale_mode",
    ),
)  # fmt: skip
VAE_READ = ("scaling_factor", "shift_factor")
NETWORK_KEYS = KnownKeys(
    classes=("SD3Transformer2DModel",),
    read=(
        "sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads",
        "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "out_channels", "pos_embed_max_size",
        "dual_attention_layers", "qk_norm",
    ),
)  # fmt: skip
