"""The training loop of train_emoji_teacher.py and the losses of its stages."""

import copy
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from emoji_teacher_data import Captions
from emoji_teacher_models import encode_text
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.devices import DTYPES, choose_precision
from fewstep.diffusion.denoiser import computing_in
from fewstep.training.ema import WeightAverage

PEAK_RATE = {"vae": 2e-3, "sd": 8e-4, "sdxl": 8e-4}
HALF_LIFE_IMAGES = {"vae": 2_000, "sd": 10_000, "sdxl": 10_000}
WARMUP_STEPS = 100
LOOKS = 8  # sample grids, and saved models, in a run
EDGE_WEIGHT, KL_WEIGHT = 0.5, 1e-4
SNR_CEILING, SNR_FLOOR = 5.0, 0.3
TEXT_BATCH, TEXT_COMPONENTS, TEXT_RATE = 128, 32, 1e-3


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
    average = WeightAverage(copy.deepcopy(network), HALF_LIFE_IMAGES[stage])
    budget.start = reported = time.monotonic()
    looks, losses = 0, []
    while (progress := budget.progress()) < 1:
        for group in optimizer.param_groups:
            group["lr"] = budget.rate(PEAK_RATE[stage])
        optimizer.zero_grad()
        # on the CPU the backward pass of fused attention is slower than plain attention at these sizes
        with fast_precision(), sdpa_kernel(SDPBackend.MATH):
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


def fast_precision() -> AbstractContextManager[object]:
    """bf16 inside, on processors that are fast in it; float32 elsewhere."""
    place = torch.device("cpu")
    return computing_in(DTYPES[choose_precision("auto", place)], place)


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
    """Mean of (min(SNR, 5) + 0.3) / SNR * (predicted - noise)^2.

    Source: Hang et al. 2023, arXiv:2303.09556, eq. 8.
    Differs: by the added 0.3. In a run this short the highest noise levels, where the text alone decides what appears,
    would otherwise weigh next to nothing: an error of the clean latents counts there by the SNR, 0.005 at the end.

    Args:
        predicted, noise: (B, C, H, W).
        signal_to_noise: (B,), alpha / (1 - alpha) of the scheduler's alphas_cumprod.
    """
    weight = (signal_to_noise.clamp(max=SNR_CEILING) + SNR_FLOOR) / signal_to_noise
    return (weight * (predicted.float() - noise).square().mean(dim=(1, 2, 3))).mean()


def whitened_components(latents: Tensor) -> Tensor:
    """The first 32 principal components of latents (N, 4, 16, 16), each with unit variance, (N, 32 or fewer)."""
    flat = latents.flatten(1) - latents.flatten(1).mean(dim=0)
    left, values, _ = torch.pca_lowrank(flat, q=min(TEXT_COMPONENTS, len(flat)), center=False)
    return left[:, values > 1e-3 * values[0]] * len(flat) ** 0.5


def teach_text(networks: nn.ModuleDict, latents: Tensor, captions: Captions, steps: int, seed: int) -> None:
    """A start for the text encoders: guess the picture's coarse content from what the U-Net will read of the caption.

    From random encoders the U-Net learns for long that all captions are alike. A linear head, dropped afterwards, reads
    the end token and the padding after it, which see the whole caption and are most of the 24 tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    target = whitened_components(latents)
    encoders = nn.ModuleDict({name: network for name, network in networks.items() if name != "unet"})
    states, pooled = encode_text(networks, *captions.draw(1, generator)[1:])
    heads = nn.ModuleList(nn.Linear(read.shape[-1], target.shape[1]) for read in (states, pooled) if read is not None)
    optimizer = torch.optim.AdamW([*encoders.parameters(), *heads.parameters()], lr=TEXT_RATE, betas=(0.9, 0.99))
    for step in range(steps):
        rows, ids, empty = captions.draw(TEXT_BATCH, generator)
        with fast_precision(), sdpa_kernel(SDPBackend.MATH):
            states, pooled = encode_text(networks, ids, empty)
            guesses = [heads[0](states)] + ([] if pooled is None else [heads[1](pooled)[:, None]])
        after_end = (ids == ids[:, -1:]).float()[..., None]  # the last of 24 tokens is the end token or its padding
        errors = [(guess.float() - target[rows][:, None]).square().mean(-1, keepdim=True) for guess in guesses]
        loss = (errors[0] * after_end).sum() / after_end.sum() + sum(error.mean() for error in errors[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"text: step {step + 1} of {steps}, loss {loss:.3f} of {len(errors)} at the start", flush=True)
