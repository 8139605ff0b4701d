"""The noise schedule that a scheduler config of diffusers describes."""

from typing import Any

import torch
from torch import Tensor


def discrete_alphas_cumprod(scheduler_config: dict[str, Any]) -> Tensor:
    """alphas_cumprod (T,) of any diffusers scheduler config with betas (DDIM, Euler, PNDM, LCM, ...)."""
    names = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    from diffusers import DDIMScheduler

    with torch.device("cpu"):  # numbers, also where the network is built on the meta device
        scheduler: Any = DDIMScheduler(**{name: scheduler_config[name] for name in names if name in scheduler_config})
    return scheduler.alphas_cumprod
