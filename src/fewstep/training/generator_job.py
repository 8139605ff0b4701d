"""What every training of a generator has in common: its average, pictures, checkpoints and result."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep import __version__
from fewstep.diffusion.condition import Condition, ConditionTable
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.samplers import sample_generator, sample_noise
from fewstep.diffusion.schedules import StepSchedule
from fewstep.distillation.roles import build_twin
from fewstep.formats.model_folder import ModelCard
from fewstep.models.model import Model
from fewstep.settings import TrainSettings
from fewstep.training.checkpoint import module_tensors, restore_module
from fewstep.training.ema import WeightAverage
from fewstep.training.health import SEEDS, sample_statistics
from fewstep.training.run_log import RunLog
from fewstep.training.update import Update

Choose = Callable[[Tensor], Condition]  # of images of these numbers


class GeneratorJob:
    """A generator in training; the base of jobs, which say how a step is made and what else is trained.

    Attributes:
        teacher: the loaded teacher.
        steps: grid indices of the generator.
        conditions: everything the generator is asked for.
        generator: the network in training.
        average: its weight average, or None.
    """

    phase: str
    first_step_shows = True
    class_names: Sequence[str] = ()

    def __init__(
        self, settings: TrainSettings, teacher: Model, steps: StepSchedule, conditions: ConditionTable,
        generator: Denoiser,
    ) -> None:  # fmt: skip
        self.settings, self.teacher, self.device = settings, teacher, teacher.device
        self.steps, self.conditions, self.generator = steps, conditions, generator
        half_life = settings.generator.ema_half_life_images
        self.average = WeightAverage(build_twin(generator, "average"), half_life) if half_life else None

    def step(self, step: int, progress: float) -> dict[str, Tensor]:
        """Make training step `step` (from 0) at `progress` in 0..1; returns scalar metrics on the device."""
        raise NotImplementedError("a GeneratorJob subclass makes the step")

    def modules(self) -> dict[str, nn.Module]:
        """Everything trained, by the name it has in checkpoints."""
        modules: dict[str, nn.Module] = {"generator": self.generator}
        if self.average is not None:
            modules["average"] = self.average.module
        return modules

    def updates(self) -> dict[str, Update]:
        """The updates, by the name their state has in checkpoints."""
        raise NotImplementedError("a GeneratorJob subclass names its updates")

    def tensors(self) -> dict[str, Tensor]:
        """Networks, average and optimisers; the teacher is frozen and stays where it is."""
        tensors = self._networks()
        for name, update in self.updates().items():
            tensors.update(update.tensors(name))
        return tensors

    def layout(self) -> dict[str, Tensor]:
        """Networks, and the moments that their optimisers will have."""
        tensors = self._networks()
        for name, update in self.updates().items():
            tensors.update(update.layout(name))
        return tensors

    def _networks(self) -> dict[str, Tensor]:
        """Networks and average."""
        tensors: dict[str, Tensor] = {}
        for name, module in self.modules().items():
            tensors.update(module_tensors(name, module))
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        for name, module in self.modules().items():
            restore_module(name, module, tensors)
        for name, update in self.updates().items():
            update.restore(name, tensors)

    def best_generator(self) -> Model:
        """The averaged generator where there is an average, else the current one; shares its weights."""
        network: Denoiser = self.generator if self.average is None else self.average.module
        return self.teacher.student(network, self._card(0))

    def sample_images(self, first: int, count: int, seed: int = 1) -> Tensor:
        """Images first..first + count - 1 of a seed, all conditions in turn, (N, C, H, W) in [-1, 1], on the CPU."""
        return self._decoded(self._generated(first, count, seed))

    @torch.no_grad()
    def pictures(self, log: RunLog, step: int) -> None:
        """Generator, and at the first step the teacher, from the same noise and conditions; of the first condition some more."""
        count = self.settings.run.sample_images
        images = self.sample_images(0, count, seed=0)
        more = self._decoded(self._generated(1, SEEDS - 1, 0, self._first_condition))
        log.picture("generator", step, images, columns=min(10, count))
        if step == 1:
            made = self._decoded(self._in_groups(partial(self._from_teacher, self._condition), 0, count))
            log.picture("teacher", step, made, columns=min(10, count))
            other = self._decoded(self._in_groups(partial(self._from_teacher, self._first_condition), 1, SEEDS - 1))
            log.keep_reference(sample_statistics(made, torch.cat([made[:1], other])))
            names = self.conditions.names(torch.arange(count) % self.conditions.num_rows)
            if names:
                log.note(self.conditions.noun, names)
        log.samples(step, sample_statistics(images, torch.cat([images[:1], more])))

    def _generated(self, first: int, count: int, seed: int, choose: Choose | None = None) -> Tensor:
        """The generator's x0 for images first..first + count - 1 of a seed."""
        network, choose = self.best_generator().denoiser, choose or self._condition

        def make(numbers: Tensor) -> Tensor:
            return sample_generator(network, self.steps, choose(numbers), seed=seed, first=int(numbers[0]))

        return self._in_groups(make, first, count)

    def _from_teacher(self, choose: Choose, numbers: Tensor) -> Tensor:
        """The teacher's x0 for images of these numbers, from the noise that the generator's start from."""
        network, family = self.teacher.denoiser, self.teacher.family
        noise = sample_noise(network, 0, int(numbers[0]), len(numbers), self.device)
        return family.sample(
            network, noise, choose(numbers), num_steps=family.default_num_steps,
            guidance_scale=self.settings.teacher.guidance,
        )  # fmt: skip

    def _condition(self, numbers: Tensor) -> Condition:
        """All conditions in turn."""
        return self.conditions.rows(numbers % self.conditions.num_rows)

    def _first_condition(self, numbers: Tensor) -> Condition:
        """The first condition for all."""
        return self.conditions.rows(torch.zeros_like(numbers))

    def _in_groups(self, make: Callable[[Tensor], Tensor], first: int, count: int) -> Tensor:
        """x0 that `make` gives for numbers first..first + count - 1; large pictures are made one by one."""
        numbers = torch.arange(first, first + count, device=self.device)
        return torch.cat([make(group) for group in numbers.split(self._group)])

    def _decoded(self, x0: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1], each group moved to the CPU before the next is decoded."""
        return torch.cat([self.teacher.decoder.images(part).cpu() for part in x0.split(self._group)])

    @property
    def _group(self) -> int:
        return self.teacher.pictures_at_once

    def _card(self, num_steps: int) -> ModelCard:
        return generator_card(self.settings, self.teacher, self.steps, num_steps)

    def save_result(self, folder: Path, num_steps: int) -> Path:
        """Write the generator (the average where there is one) with its step schedule."""
        generator = self.best_generator()
        self.teacher.student(generator.denoiser, self._card(num_steps)).write(folder / "generator")
        return folder / "generator"


def generator_card(settings: TrainSettings, teacher: Model, steps: StepSchedule, num_steps: int) -> ModelCard:
    """What stands beside a generator's weights after `num_steps` steps of a run."""
    made_with = {
        "fewstep": __version__, "num_steps": num_steps, "settings": settings.model_dump(mode="json"),
        "teacher": teacher.card.made_with,
    }  # fmt: skip
    return ModelCard(
        role="generator", step_indices=steps.indices, num_levels=steps.num_levels, step_sigmas=steps.sigmas,
        class_names=teacher.card.class_names, made_with=made_with, licence=teacher.card.licence,
        base_loras=teacher.card.base_loras,
    )  # fmt: skip
