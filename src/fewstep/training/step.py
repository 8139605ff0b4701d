"""One training step of DMD and DMD2: the two time-scale update rule, read from top to bottom."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.draws import Draws
from fewstep.distillation.inputs import GeneratorInput, GeneratorInputs, RealBatch
from fewstep.distillation.roles import Roles
from fewstep.distillation.terms import FakeScoreTerm, GeneratorTerm
from fewstep.training.update import clipped_update


@dataclass
class Distillation:
    """Everything a step reads and changes; built once from settings, so the maths has no options in it."""

    roles: Roles
    inputs: GeneratorInputs
    generator_terms: list[GeneratorTerm]
    fake_score_terms: list[FakeScoreTerm]
    generator_optimizer: torch.optim.Optimizer
    fake_score_optimizer: torch.optim.Optimizer
    generator_every: int
    max_grad_norm: float


def two_time_scale_step(run: Distillation, step: int, real: RealBatch, draws: Draws) -> dict[str, Tensor]:
    """Update the generator on its turns, and the fake score (with the discriminator) always, on the same images.

    Source: DMD2 (arXiv:2405.14867), section 4.2.

    Args:
        run: networks, terms and optimisers.
        step: number of the step; the generator's turn is every `generator_every`-th, step 0 included.
        real: real images for the terms that read them.
        draws: this step's random numbers.

    Returns:
        Scalar metrics on the device: losses, gradient norms, and each term's weighted gradient norm at the
        generator's output.
    """
    metrics: dict[str, Tensor] = {}
    batch = run.inputs(run.roles.generator, draws, real)
    if step % run.generator_every == 0:
        x0 = run.roles.generator.denoise(batch.noisy, batch.level, batch.condition)
        gradient = combined_gradient(run.generator_terms, x0.detach(), batch, draws, metrics)
        x0.backward(gradient)
        metrics["generator_grad_norm"] = clipped_update(run.generator_optimizer, run.max_grad_norm)
    else:
        with torch.no_grad():
            x0 = run.roles.generator.denoise(batch.noisy, batch.level, batch.condition)
    fresh, condition = x0[: batch.num_fresh].detach(), batch.condition[: batch.num_fresh]
    fake_score_loss(run.fake_score_terms, fresh, condition, real, draws, metrics).backward()
    metrics["fake_score_grad_norm"] = clipped_update(run.fake_score_optimizer, run.max_grad_norm)
    return metrics


def combined_gradient(
    terms: list[GeneratorTerm], x0: Tensor, batch: GeneratorInput, draws: Draws, metrics: dict[str, Tensor]
) -> Tensor:
    """Weighted sum of the terms' gradients at x0, (B, C, H, W); adds each loss and norm to `metrics`."""
    total = torch.zeros_like(x0)
    norms: list[Tensor] = []
    for term in terms:
        loss, gradient = term(x0, batch, draws)
        weighted = term.weight * gradient
        total += weighted
        norms.append(weighted.norm())
        metrics[f"{term.name}_loss"], metrics[f"{term.name}_norm_at_x0"] = loss, norms[-1]
    for term, norm in zip(terms[1:], norms[1:], strict=True):  # 0 at first, while fake score and teacher are equal
        metrics[f"{term.name}_norm_ratio"] = torch.where(norms[0] > 0, norm / norms[0].clamp_min(1e-12), 0.0)
    return total


def fake_score_loss(
    terms: list[FakeScoreTerm], x0: Tensor, condition: Condition, real: RealBatch, draws: Draws,
    metrics: dict[str, Tensor],
) -> Tensor:  # fmt: skip
    """Weighted sum of the fake score's and the discriminator's losses; adds each to `metrics`."""
    total = torch.zeros((), device=x0.device)
    for term in terms:
        loss = term(x0, condition, real, draws)
        metrics[f"{term.name}_loss"] = loss.detach()
        total = total + term.weight * loss
    return total
