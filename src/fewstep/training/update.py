"""AdamW with its rate a pure function of progress, so that a resumed run needs no scheduler state."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fewstep.settings import OptimizerSettings


def build_adamw(parameters: Iterable[nn.Parameter], lr: float, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Fused AdamW over all parameters, as published (betas 0.9, 0.999, weight decay 0.01)."""
    return torch.optim.AdamW(
        list(parameters), lr=lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


def learning_rate_factor(settings: OptimizerSettings, step: int, progress: float) -> float:
    """Multiple of the base rate at a step.

    Args:
        settings: warm-up steps and the shape after it.
        step: number of the update about to be made, from 0; the first warm-up update has 1 / warmup_steps.
        progress: share of the whole run that is done, 0..1 (by steps, or by the clock under a time limit).
    """
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.decay == "constant":
        return warmup
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return warmup * (settings.final_lr_fraction + (1 - settings.final_lr_fraction) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clipped_update(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Clip the gradient norm, step, clear the gradients. Returns the norm before clipping, on the device."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.detach()
