"""What a run is fed: the generator's conditions and inputs, real data, stored pairs. Chosen from settings once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from fewstep.data.images import ImageBatches, ImageDataset, load_images
from fewstep.data.noise_image_pairs import PAIRS, PROMPT_EMBEDDINGS, NoiseImagePairs
from fewstep.data.shard_folder import read_manifest
from fewstep.diffusion.condition import ConditionTable
from fewstep.diffusion.schedules import StepSchedule
from fewstep.distillation.inputs import (
    FreshAndPairedInputs,
    FreshInputs,
    GeneratorInputs,
    NoisedDataInputs,
    PairedInputs,
    RealBatch,
)
from fewstep.errors import UserError
from fewstep.formats.remote import data_path
from fewstep.models.model import Model
from fewstep.settings import TrainSettings

PUBLISHED_PAIR_STEPS = 256  # Heun; Yin et al. 2023 (arXiv:2311.18828), appendix B.2


class RealData(Protocol):
    """Real samples of the model's own space with their conditions."""

    def at(self, step: int, device: torch.device) -> RealBatch:
        """The batch of a step."""


@dataclass(frozen=True)
class RealImages:
    """Pictures with class labels."""

    batches: ImageBatches
    conditions: ConditionTable

    def at(self, step: int, device: torch.device) -> RealBatch:
        images, labels = self.batches.at(step, device)
        return RealBatch(images, self.conditions.rows(labels))


def build_real_data(settings: TrainSettings, teacher: Model) -> RealData | None:
    """Batches of real data, or None where no term reads them."""
    if not settings.losses.gan_discriminator_weight:
        return None
    if teacher.conditioner.every is None:
        from fewstep.training.text_data import open_latents

        return open_latents(settings, teacher)
    channels, resolution, _ = teacher.picture_shape
    dataset = load_images(
        settings.data, resolution=resolution, channels=channels, num_classes=teacher.denoiser.num_classes
    )
    settle_classes(dataset, teacher)
    batches = ImageBatches(dataset, settings.training.seed, settings.training.batch_size, settings.data.flip)
    return RealImages(batches, teacher.conditioner.every)


def build_conditions(settings: TrainSettings, teacher: Model, folder: Path) -> ConditionTable:
    """What the generator is asked for: all classes, or the prompts of the run (their embeddings go into `folder`)."""
    every = teacher.conditioner.every
    if every is not None:
        return every
    from fewstep.training.text_data import open_prompts

    return open_prompts(settings, teacher, folder)


def settle_classes(dataset: ImageDataset, teacher: Model) -> None:
    """Number the classes of pictures as the teacher does, by their names.

    Raises:
        UserError: their named classes are not the teacher's, or a teacher without names has another number of them.
    """
    names, known = dataset.class_names, teacher.card.class_names
    if names and not known and len(names) != teacher.denoiser.num_classes:
        raise UserError(
            f"data.images has {len(names)} classes ({', '.join(names[:4])}, ...) and the teacher {teacher.denoiser.num_classes} without "
            "names, so that nobody knows which is which; give one folder for each of its classes, or their numbers as `label` in a "
            "metadata.jsonl"
        )
    if names and known and set(names) != set(known):
        raise UserError(
            f"the classes of data.images ({', '.join(names[:4])}, ...) are not the teacher's "
            f"({', '.join(known[:4])}, ...); use the pictures the teacher was trained on"
        )
    dataset.label_as(known, "the teacher's")


def build_inputs(
    settings: TrainSettings, steps: StepSchedule, teacher: Model, conditions: ConditionTable
) -> GeneratorInputs:
    """What the generator is fed each step.

    Raises:
        UserError: pairs are needed and missing, or of a teacher of other samples or conditions.
    """
    if settings.generator.training_inputs == "noised_data":
        return NoisedDataInputs(steps)
    fresh = FreshInputs(steps, conditions, settings.generator.training_inputs == "simulated_per_sample")
    if not settings.losses.regression_weight:
        return fresh
    return FreshAndPairedInputs(fresh, build_paired_inputs(settings, steps, teacher))


def check_pairs(settings: TrainSettings, teacher: Model) -> list[str]:
    """Refuse another network's pairs; lines where pairs are not read, do not say whose they are, or are not made as published.

    Called while the teacher is whole: nothing shares its network yet.

    Raises:
        UserError: they were made by another network.
    """
    if not settings.data.pairs:
        return []
    if not settings.losses.regression_weight:
        return [
            f"warning: data.pairs={settings.data.pairs} is not read: only the regression loss learns from pairs; set "
            "losses.regression_weight, or leave out data.pairs"
        ]
    job, lines = read_manifest(data_path(settings.data.pairs), PAIRS).get("job", {}), list[str]()
    pairs = f"warning: data.pairs={settings.data.pairs}"
    if "network" not in job:
        lines.append(
            f"{pairs} does not say which network made it (an earlier version wrote it): that it was {settings.teacher.path} is "
            "taken on trust"
        )
    elif job["network"] != teacher.fingerprint:
        raise UserError(
            f"data.pairs={settings.data.pairs} was made by another network than the teacher's "
            f"({job.get('teacher')}): prepare pairs with this teacher"
        )
    if "num_steps" not in job:
        return lines
    if teacher.family.pair_sampler and job.get("sampler") != teacher.family.pair_sampler:
        lines.append(
            f"{pairs} starts from unscaled noise (an earlier version wrote it), published pairs from 0.9977 times it"
        )
    if not teacher.family.pair_sampler and job["num_steps"] != PUBLISHED_PAIR_STEPS:
        lines.append(
            f"{pairs} was made in {job['num_steps']} steps of the teacher's sampler; DMD's published pairs are of "
            f"{PUBLISHED_PAIR_STEPS} (fewstep prepare pairs --teacher-steps {PUBLISHED_PAIR_STEPS})"
        )
    return lines


def build_paired_inputs(settings: TrainSettings, steps: StepSchedule, teacher: Model) -> PairedInputs:
    """Stored noise-image pairs of this teacher, as `check_pairs` found.

    Raises:
        UserError: none given, or of a teacher of other samples or conditions.
    """
    if not settings.data.pairs:
        raise UserError("losses.regression_weight needs data.pairs: a folder written by `fewstep prepare pairs`")
    folder = data_path(settings.data.pairs)
    pairs = NoiseImagePairs(folder)
    if tuple(pairs.images.shape[1:]) != teacher.denoiser.image_shape:
        raise UserError(
            f"data.pairs={settings.data.pairs} holds images of shape {tuple(pairs.images.shape[1:])}, "
            f"the teacher makes {teacher.denoiser.image_shape}: prepare pairs with this teacher"
        )
    conditions = teacher.conditioner.every
    if conditions is None:
        from fewstep.preparation.stored_prompts import stored_prompts

        conditions = stored_prompts(teacher, folder / PROMPT_EMBEDDINGS)
    if int(pairs.labels.max()) >= conditions.num_rows:
        raise UserError(
            f"data.pairs={settings.data.pairs} holds labels up to {int(pairs.labels.max())}, the teacher has "
            f"{conditions.num_rows} {conditions.noun}: prepare pairs with this teacher"
        )
    return PairedInputs(steps, conditions, pairs)
