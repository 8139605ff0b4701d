"""Regression alone: a generator that reproduces the teacher's own samples, from which distillation can start."""

import torch
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.draws import Draws
from fewstep.distillation.inputs import RealBatch
from fewstep.distillation.loss_scale import LossScale
from fewstep.distillation.roles import build_twin
from fewstep.distillation.sharding import spread_of, spread_teacher
from fewstep.distillation.terms import Regression
from fewstep.errors import UserError
from fewstep.models.model import Model
from fewstep.parallel import local_batch
from fewstep.settings import TrainSettings
from fewstep.training.build import base_storage, build_distance, build_step_schedule
from fewstep.training.generator_job import GeneratorJob
from fewstep.training.inputs import build_paired_inputs
from fewstep.training.step import Tally, combined_gradient, micro_batches
from fewstep.training.update import Update, build_update, learning_rate_factor


class WarmupJob(GeneratorJob):
    """The warm-up of one-step SDXL: regression on noise-image pairs, no fake score and no discriminator.

    Source: DMD2 (arXiv:2405.14867), appendix on SDXL; the loss is that of Yin et al. 2023 (arXiv:2311.18828), eq. 9.
    """

    phase = "warmup"

    def __init__(self, settings: TrainSettings, teacher: Model) -> None:
        if settings.memory.mode != "full" or settings.generator.start_from:
            raise UserError(
                "a warm-up (regression alone) trains the full network from the teacher: leave memory.mode at 'full' and "
                "generator.start_from empty"
            )
        steps = build_step_schedule(settings, teacher.denoiser)
        teacher.limit_guidance(settings.teacher.guidance_norm_cap)  # of its sample pictures
        self.inputs = build_paired_inputs(settings, steps, teacher)
        teacher.denoiser.eval().requires_grad_(False)
        spread = spread_of(teacher.denoiser, settings.memory.teacher, settings.memory.shard_over)
        spread_teacher(teacher.denoiser, spread)
        generator = build_twin(teacher.denoiser, "generator", spread).eval().requires_grad_(True)
        base_storage(settings).store(teacher.denoiser)
        if settings.memory.checkpoint_activations:
            generator.checkpoint_activations()
        if settings.compute.compile:
            generator.compile_network()
        super().__init__(settings, teacher, steps, self.inputs.conditions, generator)
        losses, scale = settings.losses, LossScale.of(generator.compute_dtype, teacher.device)
        self.terms = [Regression(build_distance(losses, teacher), losses.regression_weight, scale=scale)]
        parameters, rates = dict(generator.named_parameters()), settings.optimizer
        self.update = build_update(parameters, rates.generator_lr, rates, scale, "generator_", [generator])
        shape = teacher.denoiser.image_shape
        self._no_data = RealBatch(torch.empty(0, *shape, device=self.device), Condition(0))

    def updates(self) -> dict[str, Update]:
        return {"generator_optimizer": self.update}

    def step(self, step: int, progress: float) -> dict[str, Tensor]:
        """One update on one batch of pairs."""
        settings, size = self.settings, self.settings.training.batch_size
        self.update.set_rate(learning_rate_factor(settings.optimizer, step, progress))
        first, own = local_batch(size)
        draws, tally = Draws.of_batch(settings.training.seed, step, own, self.device, first), Tally(self.update.scale)
        for part in micro_batches(draws, self._no_data, settings.training.microbatch_size):
            batch = self.inputs(self.generator, part.draws, part.real)
            x0 = self.generator.denoise(batch.noisy, batch.level, batch.condition)
            gradient = combined_gradient(list(self.terms), x0.detach(), batch, part, tally)
            self.update.backward_at(x0, gradient, part.is_last)
        metrics = {**tally.metrics(), **self.update.step()}
        if self.average is not None:
            self.average.update(self.generator, step * size, size, self.update.made)
        return metrics


def is_warmup(settings: TrainSettings) -> bool:
    """Whether the regression is the run's only term."""
    losses = settings.losses
    return not (losses.distribution_matching_weight or losses.gan_generator_weight)
