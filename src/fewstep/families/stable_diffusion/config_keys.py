"""Which configs of schedulers and VAEs are understood here."""

from fewstep.families.config_keys import KnownKeys

SCHEDULER_KEYS = KnownKeys(
    classes=(
        "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler",
        "UniPCMultistepScheduler", "LCMScheduler", "TCDScheduler",
    ),
    read=(
        "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
        "prediction_type",
    ),
    elsewhere=(
        "clip_sample", "clip_sample_range", "set_alpha_to_one", "steps_offset", "skip_prk_steps", "timestep_spacing",
        "interpolation_type", "variance_type", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
        "final_sigmas_type", "algorithm_type", "solver_type", "solver_order", "lower_order_final", "euler_at_final",
        "use_lu_lambdas", "lambda_min_clipped", "original_inference_steps", "timestep_scaling", "noise_sampler_seed",
        "predict_x0", "disable_corrector", "dynamic_thresholding_ratio", "sample_max_value",
    ),
)  # fmt: skip
VAE_READ = ("scaling_factor",)
# What the network's constructor builds in; the other names are refused with their reasons where the denoiser is built
NETWORK_KEYS = KnownKeys(
    classes=("UNet2DConditionModel",),
    read=(
        "sample_size", "in_channels", "out_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "mid_block_type",
        "up_block_types", "only_cross_attention", "block_out_channels", "layers_per_block", "downsample_padding",
        "mid_block_scale_factor", "dropout", "act_fn", "norm_num_groups", "norm_eps", "cross_attention_dim",
        "transformer_layers_per_block", "reverse_transformer_layers_per_block", "attention_head_dim", "num_attention_heads",
        "use_linear_projection", "addition_time_embed_dim", "upcast_attention",
        "resnet_time_scale_shift", "resnet_skip_time_act", "resnet_out_scale_factor", "time_embedding_type",
        "time_embedding_dim", "timestep_post_act", "conv_in_kernel", "conv_out_kernel",
        "projection_class_embeddings_input_dim", "mid_block_only_cross_attention", "cross_attention_norm",
        "addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type",
        "time_embedding_act_fn", "time_cond_proj_dim", "center_input_sample",
    ),
)  # fmt: skip
