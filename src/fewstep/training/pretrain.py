"""Training a teacher from nothing: the denoising objective, as a job for the one loop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import __version__
from fewstep.data.images import ImageBatches, load_images
from fewstep.devices import choose_device, prepare_denoiser
from fewstep.diffusion.condition import Condition
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.samplers import sample_noise
from fewstep.distillation.inputs import RealBatch
from fewstep.distillation.loss_scale import LossScale
from fewstep.distillation.roles import build_twin
from fewstep.errors import UserError
from fewstep.families.family import NewNetwork
from fewstep.families.registry import build_denoiser, describe_new, family_of
from fewstep.formats.model_folder import ModelCard, write_model_folder
from fewstep.losses import denoising_loss
from fewstep.progress import Stderr, busy
from fewstep.settings import PretrainSettings
from fewstep.training.checkpoint import module_tensors, restore_module
from fewstep.training.ema import WeightAverage
from fewstep.training.run_log import RunLog
from fewstep.training.step import MicroBatch, micro_batches
from fewstep.training.update import build_update, learning_rate_factor


def pictures_of(settings: PretrainSettings) -> NewNetwork:
    """What the network to be trained makes."""
    net = settings.network
    return NewNetwork(net.img_resolution, net.img_channels, net.label_dim, net.sigma_data)


class Pretraining:
    """A teacher in training on real pictures.

    Source: Karras et al. 2022 (arXiv:2206.00364), section 5: ln(sigma) ~ N(-1.2, 1.2), weight 1 / c_out^2.
    """

    phase = "pretrain"
    first_step_shows = False

    def __init__(self, settings: PretrainSettings) -> None:
        net = settings.network
        self.settings = settings
        self.device = choose_device(settings.compute.device)
        torch.manual_seed(settings.training.seed)
        try:
            description = describe_new(net.name, pictures_of(settings))
        except ValueError as error:
            raise UserError(str(error)) from None
        dataset = load_images(
            settings.data, resolution=net.img_resolution, channels=net.img_channels, num_classes=net.label_dim
        )
        self.class_names: Sequence[str] = dataset.class_names or []
        self.batches = ImageBatches(dataset, settings.training.seed, settings.training.batch_size, settings.data.flip)
        with busy(Stderr(), "Building the network"):
            self._build(description)

    def _build(self, description: dict[str, Any]) -> None:
        settings = self.settings
        model = build_denoiser(description)
        self.family = family_of(description)
        prepare_denoiser(model, str(self.device), settings.compute.precision)
        self.denoiser = model.train()
        self.average = WeightAverage(build_twin(self.denoiser, "average"), settings.ema_half_life_images)
        if settings.compute.compile:
            self.denoiser.compile_network()
        parameters, rates = dict(self.denoiser.named_parameters()), settings.optimizer
        scale = LossScale.of(self.denoiser.compute_dtype, self.device)
        self.update = build_update(parameters, rates.lr, rates, scale)

    def step(self, step: int, progress: float) -> dict[str, Tensor]:
        """One update on one batch of real pictures."""
        settings = self.settings
        size = settings.training.batch_size
        draws = Draws.of_batch(settings.training.seed, step, size, self.device)
        torch.manual_seed(draws.shared_integer("global_state", 2**31))  # dropout
        images, labels = self.batches.at(step, self.device)
        real = RealBatch(images, self._condition(draws, labels))
        total = torch.zeros((), device=self.device)
        for part in micro_batches(draws, real, settings.training.microbatch_size):
            loss = part.share * self._loss(part)
            self.update.backward(loss)
            total += loss.detach()
        self.update.set_rate(learning_rate_factor(settings.optimizer, step, progress))
        metrics = self.update.step()
        self.average.update(self.denoiser, step * size, size, self.update.made)
        return {"loss": total, **metrics}

    def _loss(self, part: MicroBatch) -> Tensor:
        """Mean denoising loss of some samples, each at its own level."""
        noise, images = self.settings.noise, part.real.images
        sigma = torch.exp(
            part.draws.normal("pretrain_level", (1,)).flatten() * noise.log_sigma_std + noise.log_sigma_mean
        )
        noisy = self.denoiser.add_noise(images, part.draws.normal("pretrain_noise", self.denoiser.image_shape), sigma)
        estimate = self.denoiser.denoise(noisy, sigma, part.real.condition)
        return denoising_loss(estimate, images, self.denoiser.denoising_weight(sigma))

    def _condition(self, draws: Draws, labels: Tensor) -> Condition:
        condition = Condition.from_labels(labels, self.denoiser.num_classes)
        rows = condition.get("class_labels")
        if rows is None or not self.settings.network.label_dropout:
            return condition
        kept = draws.uniform("label_dropout") >= self.settings.network.label_dropout
        return Condition.from_one_hot(rows * kept[:, None])

    def tensors(self) -> dict[str, Tensor]:
        """Network, average and optimiser."""
        return {
            **module_tensors("teacher", self.denoiser),
            **module_tensors("average", self.average.module),
            **self.update.tensors("optimizer"),
        }

    def layout(self) -> dict[str, Tensor]:
        """The same, in one process."""
        return self.tensors()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        restore_module("teacher", self.denoiser, tensors)
        restore_module("average", self.average.module, tensors)
        self.update.restore("optimizer", tensors)

    @torch.no_grad()
    def pictures(self, log: RunLog, step: int) -> None:
        """A grid of the averaged teacher's samples at fixed seeds."""
        count = self.settings.run.sample_images
        labels = torch.arange(count, device=self.device) % max(1, self.denoiser.num_classes)
        model = self.average.module
        noise = sample_noise(model, 0, 0, count, self.device)
        condition, steps = Condition.from_labels(labels, self.denoiser.num_classes), self.family.default_num_steps
        x0 = self.family.sample(model, noise, condition, num_steps=steps, guidance_scale=1.0)
        log.picture("teacher", step, x0, columns=min(10, count))

    def save_result(self, folder: Path, num_steps: int) -> Path:
        """Write the averaged teacher as a model folder."""
        card = teacher_card(self.settings, self.class_names, num_steps)
        write_model_folder(folder / "teacher", self.denoiser.describe(), self.average.module.state_dict(), card)
        return folder / "teacher"


def teacher_card(settings: PretrainSettings, class_names: Sequence[str], num_steps: int) -> ModelCard:
    """What stands beside a teacher's weights after `num_steps` steps of a run."""
    return ModelCard(
        role="teacher", class_names=tuple(class_names), can_be_guided=settings.network.label_dropout > 0,
        made_with={"fewstep": __version__, "num_steps": num_steps, "settings": settings.model_dump(mode="json")},
    )  # fmt: skip
