"""Which configs of networks and VAEs are understood here."""

from fewstep.families.config_keys import KnownKeys

VAE_READ = ("scaling_factor", "shift_factor")
NETWORK_KEYS = KnownKeys(
    classes=("ZImageTransformer2DModel",),
    # siglip_feat_dim, of the variant that reads pictures too, is refused unless it is null
    read=(
        "all_patch_size", "all_f_patch_size", "in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads",
        "n_kv_heads", "norm_eps", "qk_norm", "cap_feat_dim", "rope_theta", "t_scale", "axes_dims", "axes_lens",
    ),
)  # fmt: skip
