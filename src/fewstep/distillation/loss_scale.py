"""The factor that keeps half-precision gradients in range: losses times it before the backward pass, gradients divided after."""

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-10  # a loss scale below it means that overflows do not come from the scale


class LossScale:
    """torch's dynamic loss scale in fp16: halved by an overflow, doubled after 2,000 good steps. In fp32 and bf16 it is off.

    Attributes:
        scaler: torch's own; `training.update` lets it decide whether a step is made.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler

    @classmethod
    def of(cls, compute_dtype: torch.dtype, device: torch.device | str) -> "LossScale":
        """What networks that compute in this precision need."""
        half = compute_dtype == torch.float16
        return cls(torch.amp.GradScaler(torch.device(device).type if half else "cpu", enabled=half))

    @property
    def is_on(self) -> bool:
        """Whether anything is scaled."""
        return bool(self.scaler.is_enabled())

    def scaled(self, value: Tensor) -> Tensor:
        """A loss, or a gradient that a backward pass begins with, times the scale."""
        return self.scaler.scale(value)

    def gradient_at(self, loss: Tensor, x: Tensor) -> Tensor:
        """Gradient of a scalar loss at x, of x's shape and unscaled; parameters receive none.

        An overflow on its way gives infinities, which the step that they end in refuses.
        """
        (gradient,) = torch.autograd.grad(self.scaled(loss), x)
        return gradient / self.value(x.device) if self.is_on else gradient

    def value(self, device: torch.device | str) -> Tensor:
        """The scale as a scalar on the device; 1 where it is off."""
        return self.scaled(torch.ones((), device=device))

    def told(self, norm: Tensor) -> Tensor:
        """A gradient's norm for people: 0 for an overflow that a smaller scale may end; one that it cannot end says that the run is lost."""
        if not self.is_on:
            return norm
        return torch.where(norm.isfinite() | (self.value(norm.device) <= SMALLEST_SCALE), norm, 0.0)

    def state(self) -> Tensor:
        """The scale and its number of good steps in a row, float64 (2,)."""
        state = self.scaler.state_dict()
        return torch.tensor([state["scale"], state["_growth_tracker"]], dtype=torch.float64)

    def restore(self, state: Tensor) -> None:
        """Inverse of `state`."""
        scale, good_steps = state.tolist()
        self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": int(good_steps)})


NO_SCALE = LossScale.of(torch.float32, "cpu")
