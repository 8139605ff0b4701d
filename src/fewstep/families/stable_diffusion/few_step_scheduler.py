"""LCMScheduler with a generator's own steps, so that nobody types timesteps.

It samples as we do: predict x0, add fresh noise down to the next step, return the last x0. What is worked out here is
the config under which its own spacing gives the generator's steps.
"""

from typing import Any

import torch
from diffusers import DDIMScheduler, LCMScheduler

from fewstep.diffusion.schedules import StepSchedule
from fewstep.errors import UserError
from fewstep.families.few_steps import nearest_steps

_BETAS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
)  # fmt: skip


def build_few_step_scheduler(denoiser: Any, steps: StepSchedule) -> Any:
    """The scheduler whose `set_timesteps(len(steps))` gives exactly the generator's steps.

    LCMScheduler takes n steps at k - 1, 2k - 1, ..., nk - 1 with k = num_train_timesteps // n.

    `original_inference_steps` is n itself: more steps are then an error of the scheduler's own, and fewer ones are
    a subset of the steps the generator was trained at. Where nk is not the whole grid, the grid ends there: the
    first nk betas, which leaves every alpha as it was.

    Raises:
        UserError: it cannot express these steps.
    """
    n, k = len(steps), steps.indices[-1] + 1
    if k < 2 or list(steps.indices) != [number * k - 1 for number in range(n, 0, -1)]:
        raise UserError(
            f"the steps {list(steps.indices)} cannot travel in a diffusers scheduler: LCMScheduler runs n evenly spaced "
            "steps nk - 1, ..., 2k - 1, k - 1; export --as unet and give timesteps yourself, or train with such steps"
            + nearest_steps(
                steps, [[number * k - 1 for number in range(n, 0, -1)] for k in range(2, steps.num_levels // n + 1)]
            )
        )
    config: Any = denoiser.scheduler_config
    ddim: Any = DDIMScheduler(**{name: config[name] for name in _BETAS if name in config})
    options = {name: ddim.config[name] for name in _BETAS}
    if steps.num_levels // n != k:
        options = {"num_train_timesteps": n * k, "trained_betas": ddim.betas[: n * k].tolist()}
    scheduler: Any = LCMScheduler(
        **options, original_inference_steps=n, prediction_type=denoiser.prediction, clip_sample=False, steps_offset=1,
        timestep_scaling=1e4,  # the boundary scalings of consistency models: c_skip 0 and c_out 1 at every step
    )  # fmt: skip
    scheduler.set_timesteps(n)
    assert scheduler.timesteps.tolist() == list(steps.indices), scheduler.timesteps
    levels = torch.tensor(steps.indices)
    assert torch.equal(scheduler.alphas_cumprod[levels], ddim.alphas_cumprod[levels])
    return scheduler
