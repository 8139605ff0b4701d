"""The noise schedule that a scheduler config of diffusers describes."""

from typing import Any

import torch
from torch import Tensor

from fewstep.errors import first_line


def discrete_alphas_cumprod(scheduler_config: dict[str, Any]) -> Tensor:
    """alphas_cumprod (T,) of any diffusers scheduler config with betas (DDIM, Euler, PNDM, LCM, ...).

    Raises:
        ValueError: the betas are no numbers, or give no signal that falls from step to step.
    """
    names = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    from diffusers import DDIMScheduler

    values = {name: scheduler_config[name] for name in names if name in scheduler_config}
    try:
        with torch.device("cpu"):  # numbers, also where the network is built on the meta device
            scheduler: Any = DDIMScheduler(**values)
            cumprod: Tensor = scheduler.alphas_cumprod
    except (TypeError, ValueError, ArithmeticError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"the scheduler's betas give no noise schedule ({first_line(error)})") from error
    levels = scheduler.config["num_train_timesteps"]
    if len(cumprod) != levels:
        raise ValueError(f"the scheduler has {len(cumprod)} trained_betas for num_train_timesteps={levels}")
    falls = cumprod.ndim == 1 and len(cumprod) > 0 and bool((cumprod.diff() <= 0).all())
    if not falls or not bool(((cumprod >= 0) & (cumprod < 1)).all()):
        shown = ", ".join(f"{name}={str(value)[:40]}" for name, value in values.items() if "beta" in name)
        raise ValueError(f"the scheduler's betas ({shown}) give no signal that falls from step to step")
    return cumprod
