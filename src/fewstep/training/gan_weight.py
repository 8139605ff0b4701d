"""A GAN weight for a new data set: the one at which both terms pull equally hard at the generator's output."""

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track

from fewstep.errors import UserError
from fewstep.progress import Stderr
from fewstep.settings import TrainSettings
from fewstep.training.build import open_teacher
from fewstep.training.distill import DistillationJob

_PROBE = 1e-6  # too small to steer the generator, large enough for its gradient to be measured


@dataclass(frozen=True)
class GanWeight:
    """What was measured.

    Attributes:
        equal_weight: first of losses.gan_weights, at which the GAN's gradient norm at the generator's output equals
            distribution matching's.
        discriminator_weight: second of them, with which it was measured; the recipe's, or one hundredth.
        distribution_matching_norm, gan_norm: mean norms behind it; the GAN's at weight 1.
        num_updates: generator updates they were averaged over.
    """

    equal_weight: float
    discriminator_weight: float
    distribution_matching_norm: float
    gan_norm: float
    num_updates: int


def suggest_gan_weight(settings: TrainSettings, num_updates: int = 20, console: Console | None = None) -> GanWeight:
    """Train in memory for twice `num_updates` generator updates, the GAN almost off, and compare norms in the second half.

    The first half is needed because the fake score starts as the teacher, where distribution matching is zero. Nothing
    is written to the run folder but stored text embeddings.

    Raises:
        UserError: the run has no distribution matching to compare with, or its norms are zero.
    """
    losses = settings.losses
    if not losses.distribution_matching_weight:
        raise UserError(
            "--suggest-gan-weight compares with distribution matching: set losses.distribution_matching_weight"
        )
    discriminator_weight = losses.gan_discriminator_weight or 1e-2
    changed = losses.model_copy(update={"gan_weights": (_PROBE, discriminator_weight)})
    settings = settings.model_copy(update={"losses": changed})
    job = DistillationJob(settings, open_teacher(settings))
    every = settings.training.generator_every
    matching: list[torch.Tensor] = []
    gan: list[torch.Tensor] = []
    steps = range(2 * num_updates * every)
    for step in track(steps, "measuring gradient norms", console=console or Stderr()):
        metrics = job.step(step, progress=0.0)
        if step >= num_updates * every and "gan_generator_norm_at_x0" in metrics:
            matching.append(metrics["distribution_matching_norm_at_x0"])
            gan.append(metrics["gan_generator_norm_at_x0"] / _PROBE)
    matching_norm, gan_norm = float(torch.stack(matching).mean()), float(torch.stack(gan).mean())
    if not (matching_norm > 0 and gan_norm > 0):
        raise UserError(
            f"the gradient norms are {matching_norm:g} (distribution matching) and {gan_norm:g} (GAN): nothing to compare; "
            "check the learning rates (optimizer.*) and their warm-up"
        )
    return GanWeight(matching_norm / gan_norm, discriminator_weight, matching_norm, gan_norm, len(matching))
