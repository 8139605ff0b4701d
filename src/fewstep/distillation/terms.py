"""The terms of distillation: each generator term gives its loss and its gradient at the generator's output.

The step adds those gradients and sends the sum once through the generator, so every term's strength can be read
off for free and no term touches the networks' own gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser, guided_denoise
from fewstep.diffusion.draws import Draws, Purpose
from fewstep.diffusion.per_sample import per_sample
from fewstep.diffusion.precision import wide
from fewstep.distillation.divergence import DivergenceWeights
from fewstep.distillation.inputs import GeneratorInput, RealBatch
from fewstep.distillation.loss_scale import NO_SCALE, LossScale
from fewstep.losses import (
    denoising_loss,
    discriminator_adversarial_loss,
    distribution_matching_gradient,
    distribution_matching_loss,
    generator_adversarial_loss,
    regression_loss,
)
from fewstep.networks.discriminator import Head, log_ratio


class TermResult(NamedTuple):
    """Unweighted loss (scalar) and its gradient at the generator's output, (B, C, H, W)."""

    loss: Tensor
    gradient: Tensor


class GeneratorTerm(Protocol):
    """One reason for the generator to change."""

    name: str
    weight: float

    def __call__(self, x0: Tensor, batch: GeneratorInput, draws: Draws) -> TermResult:
        """Loss and gradient at `x0` (B, C, H, W, detached), the generator's output on `batch`."""


@dataclass
class Divergence:
    """What weighs the samples of distribution matching: the discriminator's logits at the scores' own noisy images."""

    discriminator: Head
    weights: DivergenceWeights

    def log_ratio(self, features: tuple[Tensor, ...]) -> Tensor:
        """(B,) of data's and generator's densities, by the fake score's features."""
        return log_ratio(self.discriminator(*features))


@dataclass
class DistributionMatching:
    """Where the teacher and the fake score disagree about noised generator images.

    Source: Yin et al. 2023 (arXiv:2311.18828), section 3.2; levels uniform over min_index..max_index inclusive.
    Differs: with `level_shift` s their share f of that range becomes s f / (1 + (s - 1) f), more often noisy above 1. Both
    estimates stay in float64 until guidance, difference and division are done, so that rounding them costs nothing.
    """

    teacher: Denoiser
    fake_score: Denoiser
    guidance_scale: float
    min_index: int
    max_index: int
    weight: float = 1.0
    name: str = "distribution_matching"
    divergence: Divergence | None = None
    level_shift: float = 1.0

    def __call__(self, x0: Tensor, batch: GeneratorInput, draws: Draws) -> TermResult:
        return self.at(x0, batch, *self.drawn(draws))

    def drawn(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Grid indices (B,) and noises (B, C, H, W) of the noisy images that the scores read."""
        index = draws.integers("dm_level", self.min_index, self.max_index + 1)
        if self.level_shift != 1:
            index = shifted_index(index, self.min_index, self.max_index, self.level_shift)
        return index, draws.normal("dm_noise", self.teacher.image_shape)

    @torch.no_grad()
    def look(self, x0: Tensor, batch: GeneratorInput, draws: Draws) -> None:
        """Let the divergence see these samples before any of the batch is weighed."""
        assert self.divergence is not None
        index, noise = self.drawn(draws)
        level = self.teacher.noise_schedule.at(index)
        noisy = wide(self.teacher.add_noise(x0[: batch.num_fresh], noise, level))
        features = self.fake_score.features(noisy, level, batch.condition[: batch.num_fresh])
        self.divergence.weights.see(self.divergence.log_ratio(features), index)

    @torch.no_grad()
    def at(self, x0: Tensor, batch: GeneratorInput, index: Tensor, noise: Tensor) -> TermResult:
        """The term at given grid indices (n,) and noises (n, C, H, W), n = batch.num_fresh."""
        fresh, condition = x0[: batch.num_fresh], batch.condition[: batch.num_fresh]
        level = self.teacher.noise_schedule.at(index)
        noisy = wide(self.teacher.add_noise(fresh, noise, level))
        real_x0 = guided_denoise(self.teacher, noisy, level, condition, self.guidance_scale)
        if self.divergence is None:
            fake_x0 = self.fake_score.denoise(noisy, level, condition)
            direction = distribution_matching_gradient(fresh, real_x0, fake_x0)
        else:
            fake_x0, features = self.fake_score(noisy, level, condition, "both")
            weights = self.divergence.weights(self.divergence.log_ratio(features), index)
            direction = distribution_matching_gradient(fresh, real_x0, fake_x0)
            direction = direction * per_sample(weights, direction)
        loss = distribution_matching_loss(fresh, direction)
        return TermResult(loss, pad_rows(direction / direction.numel(), len(x0)))


def shifted_index(index: Tensor, low: int, high: int, shift: float) -> Tensor:
    """Grid indices (B,) of low..high, drawn uniformly, moved towards noise (shift above 1) or away from it, within that range.

    An index is the middle of its part of the range; the share f where that lies becomes s f / (1 + (s - 1) f).
    """
    count = high - low + 1
    share = ((index - low).double() + 0.5) / count
    moved = shift * share / (1 + (shift - 1) * share)
    return low + (moved * count).long().clamp(0, count - 1)


@dataclass(frozen=True)
class AdversarialNoise:
    """How images are noised before the discriminator sees them.

    Attributes:
        max_index: highest grid index, counted from 0; -1 leaves images clean, at the grid's first level.
    """

    fake_score: Denoiser
    max_index: int

    def draw_index(self, draws: Draws, purpose: Purpose) -> Tensor:
        """A grid index for each sample, (B,)."""
        return draws.integers(purpose, 0, min(max(self.max_index, 0) + 1, self.fake_score.noise_schedule.num_levels))

    def add(self, images: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Noisy images (B, C, H, W) at levels (B,), or the images themselves."""
        return images if self.max_index < 0 else self.fake_score.add_noise(images, noise, level)


@dataclass
class GeneratorAdversarial:
    """Fool the discriminator on noised images; neither fake score nor head receives gradient.

    Source: DMD2 (arXiv:2405.14867), section 4.3.

    Attributes:
        beside: the term whose noisy images the discriminator reads too, instead of others of its own.
    """

    fake_score: Denoiser
    discriminator: Head
    weight: float
    name: str = "gan_generator"
    scale: LossScale = NO_SCALE
    max_index: int = 999
    beside: DistributionMatching | None = None

    def __post_init__(self) -> None:
        self.noise = AdversarialNoise(self.fake_score, self.max_index)

    def __call__(self, x0: Tensor, batch: GeneratorInput, draws: Draws) -> TermResult:
        if self.beside is not None:
            return self.at(x0, batch, *self.beside.drawn(draws))
        index = self.noise.draw_index(draws, "gan_level")
        noise = draws.normal("gan_noise", self.fake_score.image_shape)
        return self.at(x0, batch, index, noise)

    def at(self, x0: Tensor, batch: GeneratorInput, index: Tensor, noise: Tensor) -> TermResult:
        """The term at given grid indices (n,) and noises (n, C, H, W), n = batch.num_fresh."""
        fresh = x0[: batch.num_fresh].detach().requires_grad_(True)
        level = self.fake_score.noise_schedule.at(index)
        noisy = self.noise.add(fresh, noise, level)
        features = self.fake_score.features(noisy, level, batch.condition[: batch.num_fresh])
        loss = generator_adversarial_loss(self.discriminator(*features))
        return TermResult(loss.detach(), pad_rows(self.scale.gradient_at(loss, fresh), len(x0)))


@dataclass
class Regression:
    """Reproduce the teacher's own samples for stored noises.

    Source: Yin et al. 2023 (arXiv:2311.18828), eq. 9.
    """

    distance: Callable[[Tensor, Tensor], Tensor]
    weight: float
    name: str = "regression"
    scale: LossScale = NO_SCALE

    def __call__(self, x0: Tensor, batch: GeneratorInput, draws: Draws) -> TermResult:
        assert batch.target is not None
        paired = x0[batch.num_fresh :].detach().requires_grad_(True)
        loss = regression_loss(paired, batch.target, self.distance)
        gradient = self.scale.gradient_at(loss, paired)
        return TermResult(loss.detach(), torch.cat([torch.zeros_like(x0[: batch.num_fresh]), gradient]))


def pad_rows(gradient: Tensor, rows: int) -> Tensor:
    """Append zero rows up to `rows`: the gradient of a term that saw only the first ones."""
    missing = rows - len(gradient)
    if not missing:
        return gradient
    return torch.cat([gradient, gradient.new_zeros(missing, *gradient.shape[1:])])


class FakeScoreTerm(Protocol):
    """Losses of fake score and head; their gradients reach the parameters by backward.

    Attributes:
        weights: of the losses, by name.
    """

    @property
    def weights(self) -> dict[str, float]: ...

    def __call__(self, x0: Tensor, condition: Condition, real: RealBatch, draws: Draws) -> dict[str, Tensor]:
        """Scalar losses by name, on detached generated images x0 (B, C, H, W) and, where the term uses them, real ones."""


@dataclass
class FakeScoreDenoising:
    """Follow the generator's distribution: denoise its images, never guided.

    Source: Yin et al. 2023 (arXiv:2311.18828), eq. 6, in the model's native weighting.
    """

    fake_score: Denoiser
    weight: float = 1.0
    name: str = "fake_score"

    @property
    def weights(self) -> dict[str, float]:
        return {self.name: self.weight}

    def __call__(self, x0: Tensor, condition: Condition, real: RealBatch, draws: Draws) -> dict[str, Tensor]:
        return {self.name: self.at(x0, condition, *self.drawn(draws))}

    def drawn(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Grid indices (B,) of all levels, and noises (B, C, H, W)."""
        index = draws.integers("fake_level", 0, self.fake_score.noise_schedule.num_levels)
        return index, draws.normal("fake_noise", self.fake_score.image_shape)

    def at(self, x0: Tensor, condition: Condition, index: Tensor, noise: Tensor) -> Tensor:
        """The loss at given grid indices (B,) and noises (B, C, H, W)."""
        level = self.fake_score.noise_schedule.at(index)
        estimate = self.fake_score.denoise(self.fake_score.add_noise(x0, noise, level), level, condition)
        return denoising_loss(estimate, x0, self.fake_score.denoising_weight(level))


@dataclass
class DiscriminatorAdversarial:
    """Tell real from generated images, each noised at its own level, in one forward as far as the deepest tap.

    Source: DMD2 (arXiv:2405.14867), section 4.3.
    """

    fake_score: Denoiser
    discriminator: Head
    weight: float
    name: str = "gan_discriminator"
    max_index: int = 999

    def __post_init__(self) -> None:
        self.noise = AdversarialNoise(self.fake_score, self.max_index)

    @property
    def weights(self) -> dict[str, float]:
        return {self.name: self.weight}

    def __call__(self, x0: Tensor, condition: Condition, real: RealBatch, draws: Draws) -> dict[str, Tensor]:
        generated_noise = draws.normal("disc_noise_generated", self.fake_score.image_shape)
        generated = self.noise.draw_index(draws, "disc_level_generated"), generated_noise
        return {self.name: self.at(x0, condition, real, *self.drawn(draws), *generated)}

    def drawn(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Grid indices (B,) and noises (B, C, H, W) for real images."""
        return self.noise.draw_index(draws, "disc_level_real"), draws.normal(
            "disc_noise_real", self.fake_score.image_shape
        )

    def at(
        self, x0: Tensor, condition: Condition, real: RealBatch, real_index: Tensor, real_noise: Tensor,
        generated_index: Tensor, generated_noise: Tensor,
    ) -> Tensor:  # fmt: skip
        """The loss at given grid indices (B,) and noises (B, C, H, W) of real and generated images."""
        level = self.fake_score.noise_schedule.at(torch.cat([real_index, generated_index]))
        images, noise = torch.cat([real.images, x0]), torch.cat([real_noise, generated_noise])
        noisy = self.noise.add(images, noise, level)
        features = self.fake_score.features(noisy, level, Condition.cat([real.condition, condition]))
        real_logits, generated_logits = self.discriminator(*features).split([len(real.images), len(x0)])
        return discriminator_adversarial_loss(real_logits, generated_logits)


@dataclass
class DenoisingAndAdversarial:
    """Both losses of the fake score's turn from one forward on the generated images: the discriminator reads its features.

    Differs from DMD2 (arXiv:2405.14867), section 4.3, where the discriminator sees generated images under noise of their own. It
    saves their second pass as far as the deepest tap, there and back. docs/quality.md has what it is worth.
    """

    denoising: FakeScoreDenoising
    adversarial: DiscriminatorAdversarial

    @property
    def weights(self) -> dict[str, float]:
        return self.denoising.weights | self.adversarial.weights

    def __call__(self, x0: Tensor, condition: Condition, real: RealBatch, draws: Draws) -> dict[str, Tensor]:
        fake_score, discriminator = self.denoising.fake_score, self.adversarial.discriminator
        index, noise = self.denoising.drawn(draws)
        level = fake_score.noise_schedule.at(index)
        estimate, features = fake_score(fake_score.add_noise(x0, noise, level), level, condition, "both")
        real_index, real_noise = self.adversarial.drawn(draws)
        real_level = fake_score.noise_schedule.at(real_index)
        noisy = self.adversarial.noise.add(real.images, real_noise, real_level)
        real_features = fake_score.features(noisy, real_level, real.condition)
        return {
            self.denoising.name: denoising_loss(estimate, x0, fake_score.denoising_weight(level)),
            self.adversarial.name: discriminator_adversarial_loss(
                discriminator(*real_features), discriminator(*features)
            ),
        }
