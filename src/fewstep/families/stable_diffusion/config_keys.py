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
