"""EDM networks as Denoisers: preconditioning outside in float32, the network inside in its compute precision."""

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
from fewstep.diffusion.schedules import KarrasSchedule
from fewstep.families.edm.preconditioning import edm_denoising_weight, edm_preconditioning
from fewstep.families.edm.unet import EDMUNet, EDMUNetConfig


class EDMDenoiser(Denoiser):
    """D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma)/4), with the keys of EDM checkpoints (`model.*`).

    Source: Karras et al. 2022 (arXiv:2206.00364), table 1.
    """

    family = "edm"

    def __init__(self, config: EDMUNetConfig, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.model = EDMUNet(config)
        self.config = config
        self.sigma_data = sigma_data
        self.compute_dtype = torch.float32
        self.noise_schedule = KarrasSchedule()
        self.image_shape = (config.img_channels, config.img_resolution, config.img_resolution)
        self.num_classes = config.label_dim
        self.tap_shapes, self.middle = self.model.tap_shapes, self.model.middle

    def forward(self, noisy: Tensor, level: Tensor, condition: Condition, want: Want = "x0") -> DenoiserOutput:
        c = edm_preconditioning(level, self.sigma_data)
        seen = network_input(self.model, noisy)
        with computing_in(self.compute_dtype, noisy.device):
            raw, found = self.model(
                per_sample(c.c_in, seen) * seen, c.c_noise, condition.get("class_labels"),
                "output" if want == "x0" else want, self.taps,
            )  # fmt: skip
        features = None if want == "x0" else tuple(feature.to(seen.dtype) for feature in found)
        if raw is None:
            return DenoiserOutput(None, features)
        if seen.dtype != noisy.dtype:  # the x0 is wanted in float64
            c = edm_preconditioning(level.to(noisy.dtype), self.sigma_data)
        x0 = per_sample(c.c_skip, noisy) * noisy + per_sample(c.c_out, noisy) * raw.to(noisy.dtype)
        return DenoiserOutput(x0, features)

    def denoising_weight(self, level: Tensor) -> Tensor:
        return edm_denoising_weight(level, self.sigma_data)

    def blocks(self) -> list[nn.Module]:
        return self.model.blocks()

    def checkpoint_activations(self, checkpoint: Checkpoint | None = None) -> None:
        self.model.checkpoint = checkpoint or plain_checkpoint

    def compile_network(self) -> None:
        self.model.compile()

    def describe(self) -> dict[str, Any]:
        """JSON-able constructor arguments; `from_description` is the inverse."""
        return {"family": self.family, "sigma_data": self.sigma_data, "network": self.config.to_dict()}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "EDMDenoiser":
        """Build an untrained model from `describe`'s dict."""
        return cls(EDMUNetConfig.from_dict(description["network"]), float(description["sigma_data"]))
