"""What the generator is fed each step: conditions drawn independently of the real batch, and its noisy input."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fewstep.data.noise_image_pairs import NoiseImagePairs
from fewstep.diffusion.condition import Condition, ConditionTable
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.per_sample import per_sample
from fewstep.diffusion.schedules import StepSchedule
from fewstep.parallel import world_size


class RealBatch(NamedTuple):
    """Real images (B, C, H, W) with their own conditions; empty where no term reads them."""

    images: Tensor
    condition: Condition


@dataclass(frozen=True)
class GeneratorInput:
    """One batch for the generator.

    Attributes:
        noisy: what the generator denoises, (B, C, H, W).
        level: its noise level, (B,).
        condition: B conditions.
        num_fresh: the first rows, made from fresh noise; distribution matching and the fake score see only these.
        target: the teacher's images for the remaining rows, (B - num_fresh, C, H, W), or None.
    """

    noisy: Tensor
    level: Tensor
    condition: Condition
    num_fresh: int
    target: Tensor | None = None


class GeneratorInputs(Protocol):
    """Makes the generator's batch of one step."""

    def __call__(self, generator: Denoiser, draws: Draws, real: RealBatch) -> GeneratorInput:
        """The batch for these draws; a second call with the same arguments gives the same batch."""


@dataclass(frozen=True)
class FreshInputs:
    """Uniformly drawn conditions and backward-simulated inputs (for one step: pure noise).

    Attributes:
        per_sample: each sample has a step of its own, instead of one for the whole batch.
    """

    steps: StepSchedule
    conditions: ConditionTable
    per_sample: bool = False

    def __call__(self, generator: Denoiser, draws: Draws, real: RealBatch) -> GeneratorInput:
        condition = uniform_condition(self.conditions, draws)
        simulate = simulated_input_per_sample if self.per_sample else simulated_input
        noisy, level = simulate(generator, self.steps, condition, draws)
        return GeneratorInput(noisy, level, condition, num_fresh=len(condition))


@dataclass(frozen=True)
class FreshAndPairedInputs:
    """As `FreshInputs`, followed by as many stored noises whose images by the teacher are known.

    Source: Yin et al. 2023 (arXiv:2311.18828), algorithm 1.
    """

    fresh: FreshInputs
    paired: "PairedInputs"

    def __call__(self, generator: Denoiser, draws: Draws, real: RealBatch) -> GeneratorInput:
        fresh, paired = self.fresh(generator, draws, real), self.paired(generator, draws, real)
        return GeneratorInput(
            torch.cat([fresh.noisy, paired.noisy]), torch.cat([fresh.level, paired.level]),
            Condition.cat([fresh.condition, paired.condition]), fresh.num_fresh, paired.target,
        )  # fmt: skip


@dataclass(frozen=True)
class PairedInputs:
    """Stored noises alone, whose images by the teacher are known; drawn with replacement.

    For a generator of several steps each pair has a step of its own: the stored noise at the first, its image noised to the
    step's level at later ones. The target is the image.

    Attributes:
        conditions: the conditions that the pairs' labels number.
    """

    steps: StepSchedule
    conditions: ConditionTable
    pairs: NoiseImagePairs

    def __call__(self, generator: Denoiser, draws: Draws, real: RealBatch) -> GeneratorInput:
        device = draws.positions.device
        noise, image, labels = self.pairs.rows(draws.on_host().integers("pair_order", 0, len(self.pairs)))
        condition = self.conditions.rows(labels, device)
        noise, image = (part.to(device, non_blocking=True) for part in (noise, image))
        noisy, level = at_own_steps(generator, self.steps, draws, noise, image)
        return GeneratorInput(noisy, level, condition, 0, image)


@dataclass(frozen=True)
class NoisedDataInputs:
    """The ablation of backward simulation: real data noised to a step, pure noise at the first, with its own conditions.

    Each sample has a step of its own. Training and inference inputs then differ. Source: DMD2 (arXiv:2405.14867), section 4.5.
    """

    steps: StepSchedule

    def __call__(self, generator: Denoiser, draws: Draws, real: RealBatch) -> GeneratorInput:
        noise = draws.normal("generator_noise", generator.image_shape)
        noisy, level = at_own_steps(generator, self.steps, draws, noise, real.images)
        return GeneratorInput(noisy, level, real.condition, num_fresh=len(noisy))


def at_own_steps(
    generator: Denoiser, steps: StepSchedule, draws: Draws, noise: Tensor, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Samples (B, C, H, W) at a step of their own each, and its level (B,): `noise` as it is at the first step, at later ones
    `images` with other noise."""
    schedule = generator.noise_schedule
    chosen = draws.integers("simulated_step", 0, len(steps))
    level = steps.levels(schedule, chosen.device)[chosen]
    pure = schedule.initial(noise, level)
    if len(steps) == 1:
        return pure, level
    noised = generator.add_noise(images, draws.normal("simulation_noise", generator.image_shape, 1), level)
    return torch.where(per_sample(chosen == 0, pure), pure, noised), level


def uniform_condition(conditions: ConditionTable, draws: Draws) -> Condition:
    """Conditions drawn uniformly from all there are, with replacement."""
    source = draws.on_host() if conditions.on_host else draws
    return conditions.rows(source.integers("generator_label", 0, conditions.num_rows), draws.positions.device)


@torch.no_grad()
def simulated_input(
    generator: Denoiser, steps: StepSchedule, condition: Condition, draws: Draws
) -> tuple[Tensor, Tensor]:
    """Noisy input and level of one uniformly chosen step, the same on all processes.

    The current generator runs from pure noise through the steps before it, each with fresh noise; its x0 is then
    noised to the chosen step's level. At the first step the input is pure noise.
    Source: DMD2 (arXiv:2405.14867), section 4.5.

    Returns:
        noisy (B, C, H, W) and level (B,).
    """
    schedule, device = generator.noise_schedule, draws.positions.device
    chosen = draws.shared_integer("simulated_step", len(steps))

    def level(number: int) -> Tensor:
        return steps.level(schedule, number, len(condition), device)

    noisy = schedule.initial(draws.normal("generator_noise", generator.image_shape), level(0))
    for number in range(chosen):
        x0 = generator.denoise(noisy, level(number), condition)
        noise = draws.normal("simulation_noise", generator.image_shape, number + 1)
        noisy = generator.add_noise(x0, noise, level(number + 1))
    return noisy, level(chosen)


@torch.no_grad()
def simulated_input_per_sample(
    generator: Denoiser, steps: StepSchedule, condition: Condition, draws: Draws
) -> tuple[Tensor, Tensor]:
    """As `simulated_input`, but each batch holds all steps in equal shares: sample i of step s is at step (i + s) mod n.

    Differs from DMD2 (arXiv:2405.14867), section 4.5, where a batch is at one step: the fake score, which is not told the step,
    then sees the mixture that it has to model in every batch, instead of each part of it in turn. The forwards are as many on
    average. docs/quality.md has what it is worth.
    """
    schedule, device = generator.noise_schedule, draws.positions.device
    levels, chosen = steps.levels(schedule, device), steps_in_turn(draws, len(steps))
    noisy = schedule.initial(draws.normal("generator_noise", generator.image_shape), levels[0].expand(len(condition)))
    for number in range(1, len(steps)):
        later = [row for row, step in enumerate(chosen) if step >= number]
        if not later and world_size() == 1:
            break
        on_host = torch.tensor(later or [0])  # sharded processes run equally many forwards
        rows = on_host.to(device, non_blocking=True)
        before, after = (levels[index].expand(len(rows)) for index in (number - 1, number))
        x0 = generator.denoise(noisy[rows], before, condition[rows])
        if later:
            noise = draws.part(on_host).normal("simulation_noise", generator.image_shape, number)
            noisy = noisy.index_copy(0, rows, generator.add_noise(x0, noise, after))
    return noisy, levels[torch.tensor(chosen).to(device, non_blocking=True)]


def steps_in_turn(draws: Draws, count: int) -> list[int]:
    """Sample i of training step s is at step (i + s) mod `count`, whatever batch it is in.

    In a rehearsal on shapes all are at the first, as they are where a batch is at one step: what comes before is counted apart.
    """
    positions = draws.on_host().positions
    return [0] * len(positions) if positions.is_meta else [(index + draws.step) % count for index in positions.tolist()]
