"""What all networks from diffusers share: precision inside, conversion to x0 outside, checkpointed activations."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import (
    Checkpoint,
    Denoiser,
    DenoiserOutput,
    Want,
    computing_in,
    network_input,
    plain_checkpoint,
)
from fewstep.diffusion.per_sample import per_sample
from fewstep.diffusion.precision import wide
from fewstep.diffusion.schedules import DiscreteSchedule, NoiseSchedule
from fewstep.errors import UserError
from fewstep.families.prediction import (
    Prediction,
    native_denoising_weight,
    predicted_x0,
    scaled_prediction,
    x0_of_scaled,
)


class DiffusersDenoiser(Denoiser):
    """A diffusers network behind the contract; a family says how its network is called (`run_network`).

    Args:
        network: the diffusers model, kept under `network` with its own keys.
        scheduler_config: of the model's scheduler, as its folder has it.
        schedule: noise schedule the network was trained with, as that config says.
        prediction: what the network predicts.
        image_shape: (C, H, W) of the latents.

    Attributes:
        latent_multiple: the sides of the latents must be multiples of it.
        max_latent_size: their longest side, 0 where there is no limit.

    Raises:
        ValueError: epsilon prediction with a schedule whose last alpha is 0 (no x0 follows from it there).
    """

    family: str
    network: Any  # diffusers models carry no types
    latent_multiple: int
    max_latent_size: int
    has_guidance_norm = True

    def __init__(
        self, network: nn.Module, scheduler_config: dict[str, Any], schedule: NoiseSchedule, prediction: Prediction,
        image_shape: tuple[int, int, int],
    ) -> None:  # fmt: skip
        super().__init__()
        if prediction == "epsilon" and isinstance(schedule, DiscreteSchedule) and not schedule.has_signal_everywhere:
            raise ValueError(
                "the scheduler ends at zero signal (rescale_betas_zero_snr) while the model predicts epsilon: "
                "no image follows from its prediction there; use a v-prediction model"
            )
        self.network = network
        self.scheduler_config = dict(scheduler_config)
        self.noise_schedule = schedule
        self.prediction: Prediction = prediction
        self.image_shape = image_shape
        self.num_classes = 0
        self.compute_dtype = torch.float32

    def run_network(
        self, noisy: Tensor, level: Tensor, condition: Condition, want: Want
    ) -> tuple[Tensor | None, list[Tensor]]:
        """(raw prediction, None where not wanted; features at `taps`, none where not wanted); "features" stops early."""
        raise NotImplementedError("a DiffusersDenoiser subclass implements run_network")

    def forward(self, noisy: Tensor, level: Tensor, condition: Condition, want: Want = "x0") -> DenoiserOutput:
        with computing_in(self.compute_dtype, noisy.device):
            seen = network_input(self.network, noisy)
            raw, found = self.run_network(seen, level, condition, want)
        features = None if want == "x0" else tuple(feature.to(seen.dtype) for feature in found)
        if raw is None:
            return DenoiserOutput(None, features)
        alpha, sigma = (per_sample(part, noisy) for part in self._alpha_sigma(level))
        x0 = predicted_x0(self.prediction, wide(raw), wide(noisy), alpha, sigma)
        return DenoiserOutput(x0.to(noisy.dtype), features)

    def guide(
        self, unconditional: Tensor, conditional: Tensor, noisy: Tensor, level: Tensor, guidance_scale: float
    ) -> Tensor:
        """As the contract's; with a norm cap, what the network predicts is scaled down to that norm, each sample as a whole."""
        guided = self.combine(unconditional, conditional, noisy, guidance_scale)
        if not self.guidance_norm_cap:
            return guided
        noisy, alpha = noisy.to(guided.dtype), per_sample(self._alpha_sigma(level)[0], noisy).to(guided.dtype)
        plain, strong = (scaled_prediction(self.prediction, x0, noisy, alpha) for x0 in (conditional, guided))
        norms = [torch.linalg.vector_norm(part.flatten(1), dim=1) for part in (plain, strong)]
        ratio = (self.guidance_norm_cap * norms[0] / norms[1]).clamp(max=1)
        return x0_of_scaled(self.prediction, per_sample(ratio, strong) * strong, noisy, alpha)

    def combine(self, unconditional: Tensor, conditional: Tensor, noisy: Tensor, guidance_scale: float) -> Tensor:
        """x0 under guidance before any norm cap; families whose pipelines rescale it say so here."""
        return unconditional + guidance_scale * (conditional - unconditional)

    def run_block(self, block: nn.Module, *inputs: Any) -> Any:
        """One block, its activations recomputed where that is asked for."""
        if torch.is_grad_enabled() and self.network.gradient_checkpointing:
            return self.network._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def denoising_weight(self, level: Tensor) -> Tensor:
        return native_denoising_weight(self.prediction, *self._alpha_sigma(level)).float()

    def compile_network(self) -> None:
        # Blocks of one class share torch's limit of compiled forms, 8: too few for three networks with and without gradients.
        limits: Any = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 128)
        for block in self.blocks():  # `run_network` calls the blocks, never the network as a whole
            block.compile()

    def describe(self) -> dict[str, Any]:
        known = inspect.signature(type(self.network).__init__).parameters  # files may say more, which builds nothing
        config = {name: value for name, value in plain_config(self.network.config).items() if name in known}
        return {
            "family": self.family, "network": config, "scheduler": self.scheduler_config,
            "latent_size": self.image_shape[1],
        }  # fmt: skip

    @property
    def own_prefix(self) -> str:
        return "network."

    def own_weights(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

    def load_own_weights(self, weights: dict[str, Tensor]) -> None:
        self.network.load_state_dict(weights)

    def check_size(self, height: int, width: int, factor: int) -> None:
        """Refuse latents the network cannot take.

        Args:
            height, width: of the pictures, in pixels.
            factor: pixels a latent side stands for.

        Raises:
            UserError: not a multiple of what the network halves, or above what it has positions for.
        """
        multiple = self.latent_multiple * factor
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise UserError(f"size {height}x{width}: this model makes pictures whose sides are multiples of {multiple}")
        if self.max_latent_size and max(height, width) > self.max_latent_size * factor:
            raise UserError(
                f"size {height}x{width}: this model has positions for sides up to {self.max_latent_size * factor}"
            )

    def checkpoint_activations(self, checkpoint: Checkpoint | None = None) -> None:
        self.network.enable_gradient_checkpointing(checkpoint or plain_checkpoint)

    def _alpha_sigma(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma (B,) in float64 where the device has it."""
        schedule = self.noise_schedule
        if isinstance(schedule, DiscreteSchedule):
            return schedule.alpha64(level), schedule.sigma64(level)
        return schedule.alpha(wide(level)), schedule.sigma(wide(level))


def plain_config(config: Any) -> dict[str, Any]:
    """A diffusers config without its private entries."""
    return {name: value for name, value in dict(config).items() if not name.startswith("_")}
