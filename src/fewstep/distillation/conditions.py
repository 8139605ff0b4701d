"""What the generator is fed each step: conditions drawn independently of the real batch, and its noisy input."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.data.noise_image_pairs import NoiseImagePairs
from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.step_schedule import StepSchedule
from fewstep.distillation.backward_simulation import simulated_input


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

    def __call__(self, generator: Denoiser, draws: Draws) -> GeneratorInput:
        """The batch for these draws; a second call with the same arguments gives the same batch."""


@dataclass(frozen=True)
class FreshInputs:
    """Uniform labels and backward-simulated inputs (for one step: pure noise)."""

    steps: StepSchedule

    def __call__(self, generator: Denoiser, draws: Draws) -> GeneratorInput:
        condition = uniform_condition(generator, draws)
        noisy, level = simulated_input(generator, self.steps, condition, draws)
        return GeneratorInput(noisy, level, condition, num_fresh=len(condition))


@dataclass(frozen=True)
class FreshAndPairedInputs:
    """As `FreshInputs`, followed by as many stored noises whose images by the teacher are known.

    Source: Yin et al. 2023 (arXiv:2311.18828), algorithm 1.
    """

    steps: StepSchedule
    pairs: NoiseImagePairs

    def __call__(self, generator: Denoiser, draws: Draws) -> GeneratorInput:
        fresh = FreshInputs(self.steps)(generator, draws)
        rows = draws.integers("pair_order", 0, len(self.pairs))
        noise, image, labels = self.pairs.rows(rows, fresh.noisy.device)
        paired = Condition.from_labels(labels, generator.num_classes)
        level = fresh.level[:1].expand(len(noise))
        noisy = generator.noise_schedule.initial(noise, level)
        return GeneratorInput(
            torch.cat([fresh.noisy, noisy]), torch.cat([fresh.level, level]),
            Condition.cat([fresh.condition, paired]), fresh.num_fresh, image,
        )  # fmt: skip


def uniform_condition(denoiser: Denoiser, draws: Draws) -> Condition:
    """Uniformly drawn class labels; the empty condition for models without classes."""
    labels = draws.integers("generator_label", 0, max(1, denoiser.num_classes))
    return Condition.from_labels(labels, denoiser.num_classes)
