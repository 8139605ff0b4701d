"""What all families of flow models share whose pipelines give their scheduler the steps: shift, sampler, few-step scheduler.

Their networks predict noise - x0 on straight paths (alpha = 1 - t, sigma = t); what they are called with is a family's own.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.flow_shift import FlowShift
from fewstep.diffusion.samplers import sample_levels
from fewstep.diffusion.schedules import StepSchedule
from fewstep.errors import UserError
from fewstep.families.config_keys import KnownKeys
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.families.diffusers_family import DiffusersFamily

SCHEDULER_KEYS = KnownKeys(
    classes=("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"),
    read=(
        "num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len",
        "max_image_seq_len", "time_shift_type", "shift_terminal",
    ),
    # the stock sampler's own noise; of few-step schedulers
    elsewhere=("stochastic_sampling", "scale_factors", "upscale_mode"),
)  # fmt: skip

_MOST_MU = math.log(1e6)  # of a dynamic shift: as much as a static one may be


class FlowDenoiser(DiffusersDenoiser):
    """A transformer that predicts the flow, and the shift of its scheduler.

    Args:
        network, scheduler_config: as `DiffusersDenoiser` takes them.
        shift: what the config says.
        image_shape: (C, H, W) of the latents.
        latent_multiple: side of a patch: (H / that) x (W / that) image tokens.
        grid_steps: number of steps whose shift the training grid has, where it depends on them.

    Raises:
        ValueError: latents that are not whole patches, or more image tokens than the scheduler's shift is known for.
    """

    def __init__(
        self, network: Any, scheduler_config: dict[str, Any], shift: FlowShift, image_shape: tuple[int, int, int],
        latent_multiple: int, grid_steps: int,
    ) -> None:  # fmt: skip
        height, width = image_shape[-2:]
        if height % latent_multiple or width % latent_multiple:
            raise ValueError(
                f"latents of {height}x{width} do not fit this transformer: it takes multiples of its patch size "
                f"{latent_multiple} (teacher.resolution)"
            )
        self.latent_multiple, self.max_latent_size = latent_multiple, 0
        tokens = self.num_tokens(image_shape)
        if reason := _beyond(shift, tokens):
            raise ValueError(f"{reason} (teacher.resolution)")
        super().__init__(network, scheduler_config, shift.schedule(tokens, grid_steps), "flow", image_shape)
        self.shift = shift

    def num_tokens(self, shape: tuple[int, ...]) -> int:
        """Image tokens of latents (..., H, W)."""
        return (shape[-2] // self.latent_multiple) * (shape[-1] // self.latent_multiple)

    def check_size(self, height: int, width: int, factor: int) -> None:
        super().check_size(height, width, factor)
        if reason := _beyond(self.shift, self.num_tokens((height // factor, width // factor))):
            raise UserError(f"size {height}x{width}: {reason}")


class FlowFamily(DiffusersFamily):
    """A text-to-image flow transformer.

    Attributes:
        default_resolution: side of the pictures in pixels where the VAE's config does not say.
    """

    component = "transformer"
    scheduler_class = "FlowMatchLCMScheduler"
    scheduler_keys = SCHEDULER_KEYS
    sampler_name = "Euler"
    pair_sampler = ""
    default_resolution = 1024

    def has_network(self, config: dict[str, Any]) -> bool:
        return True

    def sample(
        self, denoiser: Denoiser, noise: Tensor, condition: Condition, *, num_steps: int, guidance_scale: float
    ) -> Tensor:
        network: Any = denoiser.base_network
        sigmas = network.shift.sigmas(network.num_tokens(tuple(noise.shape)), num_steps)
        levels = torch.tensor(sigmas, device=noise.device)
        return sample_levels(denoiser, noise, condition, levels, guidance_scale=guidance_scale)

    def sample_pairs(
        self, denoiser: Denoiser, noise: Tensor, condition: Condition, *, num_steps: int, guidance_scale: float
    ) -> Tensor:
        return self.sample(denoiser, noise, condition, num_steps=num_steps, guidance_scale=guidance_scale)

    def few_step_scheduler(self, denoiser: Denoiser, steps: StepSchedule) -> Any:
        from fewstep.families.few_steps import build_flow_scheduler

        return build_flow_scheduler(denoiser, steps, [1 - number / len(steps) for number in range(len(steps))])

    def pipeline_options(self, size: tuple[int, int]) -> dict[str, Any]:
        """With the size: these networks' configs have no place for it, and their pipelines make 1024 pixels unasked."""
        return {**super().pipeline_options(size), "height": size[0], "width": size[1]}

    def resolution(self, folder: Path) -> int:
        """The side that the VAE's config names: these transformers have none."""
        return int(self.read_autoencoder_config(folder).get("sample_size") or self.default_resolution)

    def _latent_size(self, folder: Path, resolution: int) -> int:
        return super()._latent_size(folder, resolution or self.resolution(folder))


def _beyond(shift: FlowShift, num_tokens: int) -> str:
    """Why the scheduler's shift is not known for so many image tokens, or leaves no noise levels; empty where it is."""
    if shift.mu is not None and shift.is_exponential and shift.mu(num_tokens, 1) > _MOST_MU:
        return f"{num_tokens} image tokens are so many that the scheduler's dynamic shift leaves pure noise alone"
    if not shift.max_tokens or num_tokens <= shift.max_tokens:
        return ""
    side = math.isqrt(shift.max_tokens)
    return (
        f"{num_tokens} image tokens are more than the {shift.max_tokens} (about {side}x{side}) that the scheduler's "
        "dynamic shift is known for"
    )
