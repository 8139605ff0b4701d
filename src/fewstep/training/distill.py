"""Distilling a generator, as a job for the one loop."""

from pathlib import Path

import torch
from torch import Tensor

from fewstep import __version__
from fewstep.config import TrainSettings
from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.samplers import sample_generator, sample_noise, sample_teacher
from fewstep.distillation.conditions import RealBatch
from fewstep.formats.model_folder import ModelCard
from fewstep.generator import AnyGenerator, AnyTeacher
from fewstep.training.build import build_conditions, build_distillation, build_real_data, build_step_schedule
from fewstep.training.checkpoint import module_tensors, optimizer_tensors, restore_module, restore_optimizer
from fewstep.training.ema import WeightAverage
from fewstep.training.optimizers import learning_rate_factor, set_learning_rate
from fewstep.training.run_log import RunLog
from fewstep.training.step import two_time_scale_step

DIAGNOSTIC_INDICES = (200, 400, 600, 800)


class DistillationJob:
    """A generator in training against a frozen teacher.

    Attributes:
        teacher: the loaded teacher.
        average: weight average of the generator, or None.
    """

    phase = "distill"

    def __init__(self, settings: TrainSettings, teacher: AnyTeacher) -> None:
        self.settings, self.teacher = settings, teacher
        self.device = teacher.device
        self.steps = build_step_schedule(settings)
        self.conditions = build_conditions(settings, teacher, Path(settings.run.folder))
        self.real_data = build_real_data(settings, teacher)
        self.run = build_distillation(settings, teacher, self.conditions)
        half_life = settings.generator.ema_half_life_images
        self.average = WeightAverage(self.run.roles.generator, half_life) if half_life else None

    def step(self, step: int, progress: float) -> dict[str, Tensor]:
        """One two time-scale step, with this step's rates, batch and draws."""
        settings, size = self.settings, self.settings.training.batch_size
        factor = learning_rate_factor(settings.optimizer, step, progress)
        set_learning_rate(self.run.generator_optimizer, settings.optimizer.generator_lr * factor)
        set_learning_rate(self.run.fake_score_optimizer, settings.optimizer.fake_score_lr * factor)
        draws = Draws.of_batch(settings.training.seed, step, size, self.device)
        metrics = two_time_scale_step(self.run, step, self._real_batch(step), draws)
        if self.average is not None and step % settings.training.generator_every == 0:
            span = size * settings.training.generator_every
            self.average.update(self.run.roles.generator, step * size, span)
        return metrics

    def _real_batch(self, step: int) -> RealBatch:
        if self.real_data is None:
            shape = self.teacher.denoiser.image_shape
            return RealBatch(torch.empty(0, *shape, device=self.device), Condition(0))
        return self.real_data.at(step, self.device)

    def tensors(self) -> dict[str, Tensor]:
        """Networks, average and optimisers; the teacher is frozen and stays where it is."""
        tensors: dict[str, Tensor] = {}
        for name, module in self._modules().items():
            tensors.update(module_tensors(name, module))
        for name, optimizer in self._optimizers().items():
            tensors.update(optimizer_tensors(name, optimizer))
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        for name, module in self._modules().items():
            restore_module(name, module, tensors)
        for name, optimizer in self._optimizers().items():
            restore_optimizer(name, optimizer, tensors)

    def _modules(self) -> dict[str, torch.nn.Module]:
        roles = self.run.roles
        modules: dict[str, torch.nn.Module] = {"generator": roles.generator, "fake_score": roles.fake_score}
        if roles.discriminator is not None:
            modules["discriminator"] = roles.discriminator
        if self.average is not None:
            modules["average"] = self.average.module
        return modules

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            "generator_optimizer": self.run.generator_optimizer,
            "fake_score_optimizer": self.run.fake_score_optimizer,
        }

    def best_generator(self) -> AnyGenerator:
        """The averaged generator where there is an average, else the current one; shares its weights."""
        network: Denoiser = self.run.roles.generator if self.average is None else self.average.module
        return self.teacher.student(network, self._card(0))

    @torch.no_grad()
    def pictures(self, log: RunLog, step: int) -> None:
        """Generator and teacher from the same noise, and both scores' estimates on noised generator images."""
        generator = self.best_generator().denoiser
        count = self.settings.run.sample_images
        condition = self.conditions.rows(torch.arange(count, device=self.device) % self.conditions.num_rows)
        show = self.teacher.to_images
        x0 = sample_generator(generator, self.steps, condition, seed=0)
        log.picture("generator", step, show(x0), columns=min(10, count))
        if step == 1:
            noise = sample_noise(generator, 0, 0, count, self.device)
            guidance = self.settings.teacher.guidance_scale
            made = sample_teacher(self.teacher.denoiser, noise, condition, guidance_scale=guidance)
            log.picture("teacher", step, show(made), min(10, count))
        shown = min(10, count)
        for name, network in (("teacher_score", self.teacher.denoiser), ("fake_score", self.run.roles.fake_score)):
            rows = [self._estimate(network, x0[:shown], condition[:shown], index) for index in DIAGNOSTIC_INDICES]
            log.picture(name, step, show(torch.cat([x0[:shown], *rows])), columns=shown)

    def _estimate(self, network: Denoiser, x0: Tensor, condition: Condition, index: int) -> Tensor:
        level = network.noise_schedule.expanded(index, len(x0), self.device)
        noise = Draws.of_batch(0, index, len(x0), self.device).normal("diagnostic_noise", network.image_shape)
        return network.denoise(network.add_noise(x0, noise, level), level, condition)

    def _card(self, num_steps: int) -> ModelCard:
        made_with = {
            "fewstep": __version__, "num_steps": num_steps, "settings": self.settings.model_dump(mode="json"),
            "teacher": self.teacher.card.made_with,
        }  # fmt: skip
        return ModelCard(
            role="generator", step_indices=self.steps.indices, num_levels=self.steps.num_levels,
            class_names=self.teacher.card.class_names, made_with=made_with, licence=self.teacher.card.licence,
        )  # fmt: skip

    def save_result(self, folder: Path, num_steps: int) -> Path:
        """Write the generator (the average where there is one) as a model folder with its step schedule."""
        self.teacher.write_generator(folder / "generator", self.best_generator().denoiser, self._card(num_steps))
        return folder / "generator"
