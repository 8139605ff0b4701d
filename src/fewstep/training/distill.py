"""Distilling a generator, as a job for the one loop."""

from functools import partial

import torch
from torch import Tensor, nn

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draws import Draws
from fewstep.distillation.inputs import RealBatch
from fewstep.models.model import Model
from fewstep.parallel import local_batch
from fewstep.progress import Stderr, busy
from fewstep.settings import TrainSettings
from fewstep.training.build import build_distillation, build_step_schedule
from fewstep.training.generator_job import GeneratorJob
from fewstep.training.inputs import build_conditions, build_real_data
from fewstep.training.run_folder import run_folder
from fewstep.training.run_log import RunLog
from fewstep.training.step import two_time_scale_step
from fewstep.training.update import Update, learning_rate_factor

DIAGNOSTIC_INDICES = (200, 400, 600, 800)


class DistillationJob(GeneratorJob):
    """A generator in training against a frozen teacher, a fake score and, with a GAN, a discriminator."""

    phase = "distill"

    def __init__(self, settings: TrainSettings, teacher: Model) -> None:
        conditions = build_conditions(settings, teacher, run_folder(settings))
        self.real_data = build_real_data(settings, teacher)
        with busy(Stderr(), "Building generator, fake score and their optimisers"):
            self.run = build_distillation(settings, teacher, conditions)
        steps = build_step_schedule(settings, teacher.denoiser)
        super().__init__(settings, teacher, steps, conditions, self.run.roles.generator)

    def step(self, step: int, progress: float) -> dict[str, Tensor]:
        """One two time-scale step, with this step's rates, batch and draws."""
        settings, size = self.settings, self.settings.training.batch_size
        factor = learning_rate_factor(settings.optimizer, step, progress)
        self.run.generator_update.set_rate(factor)
        self.run.fake_score_update.set_rate(factor)
        first, own = local_batch(size)
        draws = Draws.of_batch(settings.training.seed, step, own, self.device, first)
        if settings.memory.lora_dropout:
            torch.manual_seed(draws.shared_integer("global_state", 2**31) + first)
        metrics = two_time_scale_step(self.run, step, self._real_batch(step), draws)
        if self.average is not None and step % settings.training.generator_every == 0:
            span = size * settings.training.generator_every
            self.average.update(self.generator, step * size, span, self.run.generator_update.made)
        return metrics

    def _real_batch(self, step: int) -> RealBatch:
        if self.real_data is None:
            shape = self.teacher.denoiser.image_shape
            return RealBatch(torch.empty(0, *shape, device=self.device), Condition(0))
        return self.real_data.at(step, self.device)

    def modules(self) -> dict[str, nn.Module]:
        roles = self.run.roles
        modules: dict[str, nn.Module] = {"generator": roles.generator, "fake_score": roles.fake_score}
        if roles.discriminator is not None:
            modules["discriminator"] = roles.discriminator
        if self.run.weights is not None:
            modules["divergence"] = self.run.weights
        return {**modules, **super().modules()}

    def updates(self) -> dict[str, Update]:
        return {"generator_optimizer": self.run.generator_update, "fake_score_optimizer": self.run.fake_score_update}

    @torch.no_grad()
    def pictures(self, log: RunLog, step: int) -> None:
        """Generator and teacher from the same noise, and both scores' estimates on noised generator images."""
        super().pictures(log, step)
        shown = min(10, self.settings.run.sample_images)
        x0 = self._generated(0, shown, seed=0)
        for name, network in (("teacher_score", self.teacher.denoiser), ("fake_score", self.run.roles.fake_score)):
            rows = [
                self._in_groups(partial(self._estimate, network, index, x0), 0, shown) for index in DIAGNOSTIC_INDICES
            ]
            log.picture(name, step, self._decoded(torch.cat([x0, *rows])), columns=shown)

    def _estimate(self, network: Denoiser, index: int, x0: Tensor, numbers: Tensor) -> Tensor:
        """A score's estimate of the pictures of these numbers among x0, noised to a grid index."""
        level = network.noise_schedule.expanded(index, len(numbers), self.device)
        noise = Draws(0, index, numbers).normal("diagnostic_noise", network.image_shape)
        return network.denoise(network.add_noise(x0[numbers], noise, level), level, self._condition(numbers))
