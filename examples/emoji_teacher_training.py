"""The training loop of train_emoji_teacher.py and the losses of its stages."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.training.ema import WeightAverage

PEAK_RATE = {"vae": 2e-3, "sd": 8e-4, "sdxl": 8e-4}
HALF_LIFE_IMAGES = {"vae": 2_000, "sd": 10_000, "sdxl": 10_000}
WARMUP_STEPS = 100
LOOKS = 8  # sample grids, and saved models, in a run
EDGE_WEIGHT, KL_WEIGHT = 0.5, 1e-4
MIN_SNR_GAMMA = 5.0


@dataclass
class Budget:
    """How far a stage is, by the clock or by steps."""

    minutes: float
    steps: int | None
    done: int = 0
    start: float = 0.0

    def progress(self) -> float:
        """0 at the start, 1 or more at the end."""
        if self.steps is not None:
            return self.done / self.steps
        return (time.monotonic() - self.start) / (60 * self.minutes)

    def rate(self, peak: float) -> float:
        """Learning rate of the next step: linear warm-up, then a cosine to 0."""
        return peak * min(1, (self.done + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(1, self.progress())))


def train(
    stage: str, network: nn.Module, batch: int, budget: Budget,
    loss_of: Callable[[], Tensor], look: Callable[[nn.Module, int], None],
) -> nn.Module:  # fmt: skip
    """Minimise loss_of() over the network's weights until the budget is spent; returns their average.

    `look(average, step)` is called LOOKS times, the last time at the end.
    """
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = WeightAverage(network, HALF_LIFE_IMAGES[stage])
    budget.start = reported = time.monotonic()
    looks, losses = 0, []
    while (progress := budget.progress()) < 1:
        for group in optimizer.param_groups:
            group["lr"] = budget.rate(PEAK_RATE[stage])
        optimizer.zero_grad()
        # on the CPU the backward pass of fused attention is slower than plain attention at these sizes
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        budget.done += 1
        average.update(network, budget.done * batch, batch)
        losses.append(loss.detach())
        if time.monotonic() - reported > 15:
            seconds = (time.monotonic() - reported) / len(losses)
            mean = torch.stack(losses).mean()
            print(f"{stage}: {progress:.0%}, step {budget.done}, loss {mean:.4f}, {seconds:.2f} s a step", flush=True)
            reported, losses = time.monotonic(), []
        if looks < int(LOOKS * budget.progress()) < LOOKS:
            looks = int(LOOKS * budget.progress())
            look(average.module, budget.done)
            reported, losses = time.monotonic(), []
    look(average.module, budget.done)
    return average.module


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbouring pixels, across and down."""
    return images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]


def autoencoder_loss(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """Mean absolute error of pixels and of edges, and a small Kullback-Leibler term; all are means over elements."""
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample(generator)).sample.float()
    pixel_error = (decoded - images).abs().mean()
    edge_error = sum((a - b).abs().mean() for a, b in zip(edges(decoded), edges(images), strict=True))
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return pixel_error + EDGE_WEIGHT * edge_error + KL_WEIGHT * divergence


def diffusion_loss(predicted: Tensor, noise: Tensor, signal_to_noise: Tensor) -> Tensor:
    """Mean of min(SNR, 5) / SNR * (predicted - noise)^2. Source: Hang et al. 2023, arXiv:2303.09556, eq. 8."""
    weight = signal_to_noise.clamp(max=MIN_SNR_GAMMA) / signal_to_noise
    return (weight * (predicted.float() - noise).square().mean(dim=(1, 2, 3))).mean()
