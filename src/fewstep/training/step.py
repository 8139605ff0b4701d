"""One training step of DMD and DMD2: the two time-scale update rule, read from top to bottom."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.draws import Draws
from fewstep.distillation.divergence import DivergenceWeights
from fewstep.distillation.inputs import GeneratorInput, GeneratorInputs, RealBatch
from fewstep.distillation.loss_scale import NO_SCALE, LossScale
from fewstep.distillation.roles import Roles
from fewstep.distillation.terms import DistributionMatching, FakeScoreTerm, GeneratorTerm
from fewstep.parallel import mean, world_size
from fewstep.training.update import Update


@dataclass
class Distillation:
    """Everything a step reads and changes; built once from settings, so the maths has no options in it.

    Attributes:
        generator_every: fake-score steps per generator update.
        microbatch_size: samples that go through the networks at once; 0: the whole batch.
        weighed: the term whose samples are weighed against their whole batch (f-divergences), if one is.
    """

    roles: Roles
    inputs: GeneratorInputs
    generator_terms: list[GeneratorTerm]
    fake_score_terms: list[FakeScoreTerm]
    generator_update: Update
    fake_score_update: Update
    generator_every: int
    microbatch_size: int = 0
    weighed: DistributionMatching | None = None

    @property
    def weights(self) -> DivergenceWeights | None:
        """Of the weighed term."""
        return None if self.weighed is None or self.weighed.divergence is None else self.weighed.divergence.weights


def two_time_scale_step(run: Distillation, step: int, real: RealBatch, draws: Draws) -> dict[str, Tensor]:
    """Update the generator on its turns, and the fake score (with the discriminator) always, on the same images.

    Source: DMD2 (arXiv:2405.14867), section 4.2.

    Args:
        run: networks, terms and updates.
        step: number of the step; the generator's turn is every `generator_every`-th, step 0 included.
        real: real images for the terms that read them.
        draws: this step's random numbers.

    Returns:
        Scalar metrics on the device: losses, gradient norms, and each term's weighted gradient norm at the
        generator's output.
    """
    tally = Tally(run.generator_update.scale)
    parts = micro_batches(draws, real, run.microbatch_size)
    made: list[tuple[Tensor, Condition]] = []  # the generator's images and what they were asked for
    generators_turn = step % run.generator_every == 0
    if generators_turn and len(parts) > 1:
        look_across(run, parts)
    for part in parts:
        batch = run.inputs(run.roles.generator, part.draws, part.real)
        if generators_turn:
            x0 = run.roles.generator.denoise(batch.noisy, batch.level, batch.condition)
            gradient = combined_gradient(run.generator_terms, x0.detach(), batch, part, tally)
            run.generator_update.backward_at(x0, gradient, part.is_last)
        else:
            rows = slice(batch.num_fresh)  # of stored pairs only the generator's turn learns
            with torch.no_grad():
                x0 = run.roles.generator.denoise(batch.noisy[rows], batch.level[rows], batch.condition[rows])
        made.append((x0[: batch.num_fresh].detach(), batch.condition[: batch.num_fresh]))
    updated = run.generator_update.step() if generators_turn else {}
    if generators_turn and run.weights is not None:
        run.weights.finish()
    for part, (fresh, condition) in zip(parts, made, strict=True):
        loss = fake_score_loss(run.fake_score_terms, fresh, condition, part, tally)
        run.fake_score_update.backward(loss, part.is_last)
    return {**tally.metrics(), **updated, **run.fake_score_update.step()}


@torch.no_grad()
def look_across(run: Distillation, parts: list["MicroBatch"]) -> None:
    """Let a divergence see the whole batch before its first micro-batch is weighed; costs a forward of generator and encoder."""
    if run.weighed is None or run.weights is None:
        return
    for part in parts:
        batch = run.inputs(run.roles.generator, part.draws, part.real)
        run.weighed.look(run.roles.generator.denoise(batch.noisy, batch.level, batch.condition), batch, part.draws)
    run.weights.settle()


@dataclass(frozen=True)
class MicroBatch:
    """Some samples of a step's batch.

    Attributes:
        draws, real: of these samples.
        share: of this process's batch; what a mean over these samples counts in the mean over all. Processes have equal
            batches and take the mean of their gradients, so that a loss is a mean over the global batch.
        is_last: none follows in this step.
    """

    draws: Draws
    real: RealBatch
    share: float
    is_last: bool


def micro_batches(draws: Draws, real: RealBatch, size: int) -> list[MicroBatch]:
    """The batch in parts of `size` samples (0: in one); a sample's draws do not depend on the part it is in."""
    count = len(draws.positions)
    slices = [slice(first, first + (size or count)) for first in range(0, count, size or count)]
    return [
        MicroBatch(
            draws.part(rows), RealBatch(real.images[rows], real.condition[rows]),
            len(draws.positions[rows]) / count, rows.stop >= count,
        )
        for rows in slices
    ]  # fmt: skip


@dataclass
class Tally:
    """A step's losses and gradient norms, gathered over its micro-batches.

    Attributes:
        scale: of the losses whose gradients the norms are of.
    """

    scale: LossScale = NO_SCALE
    losses: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, list[Tensor]] = field(default_factory=dict)

    def add_loss(self, name: str, loss: Tensor, share: float) -> None:
        """A mean over the samples of one micro-batch."""
        self.losses[name] = self.losses.get(name, 0.0) + share * loss.detach()

    def metrics(self) -> dict[str, Tensor]:
        """Means and norms over the whole batch of all processes; each term's norm relative to the first term's."""
        losses = dict(self.losses)
        norms = {name: parts[0] if len(parts) == 1 else torch.stack(parts).norm() for name, parts in self.norms.items()}
        # in one exchange: a norm's square is a sum over samples, whose gradients count 1 / processes
        if world_size() > 1:
            squares = [norm.square() / world_size() for norm in norms.values()]
            together = mean(torch.stack([*losses.values(), *squares]))
            losses = dict(zip(losses, together, strict=False))
            norms = dict(zip(norms, together[len(losses) :].sqrt(), strict=True))
        found = {f"{name}_loss": loss for name, loss in losses.items()}
        norms = {name: self.scale.told(norm) for name, norm in norms.items()}
        found |= {f"{name}_norm_at_x0": norm for name, norm in norms.items()}
        first = next(iter(norms.values()), torch.zeros(()))  # 0 at first, while fake score and teacher are equal
        for name in list(norms)[1:]:
            found[f"{name}_norm_ratio"] = torch.where(first > 0, norms[name] / first.clamp_min(1e-12), 0.0)
        return found


def combined_gradient(
    terms: list[GeneratorTerm], x0: Tensor, batch: GeneratorInput, part: MicroBatch, tally: Tally
) -> Tensor:
    """Weighted sum of the terms' gradients at x0, (B, C, H, W), of a loss that is a mean over the whole batch."""
    total = torch.zeros_like(x0)
    for term in terms:
        loss, gradient = term(x0, batch, part.draws)
        weighted = part.share * term.weight * gradient
        total += weighted
        tally.add_loss(term.name, loss, part.share)
        tally.norms.setdefault(term.name, []).append(weighted.norm())
    return total


def fake_score_loss(
    terms: list[FakeScoreTerm], x0: Tensor, condition: Condition, part: MicroBatch, tally: Tally
) -> Tensor:
    """Weighted sum of the fake score's and the discriminator's losses, as their share of a mean over the whole batch."""
    total = torch.zeros((), device=x0.device)
    for term in terms:
        for name, loss in term(x0, condition, part.real, part.draws).items():
            tally.add_loss(name, loss, part.share)
            total = total + term.weights[name] * loss
    return part.share * total
