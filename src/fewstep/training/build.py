"""From settings to a distillation: networks, terms and optimisers are chosen here, once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.devices import choose_device, set_precision
from fewstep.diffusion.condition import ConditionTable
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.schedules import StepSchedule
from fewstep.distillation.divergence import DivergenceWeights
from fewstep.distillation.loss_scale import LossScale
from fewstep.distillation.roles import Roles, build_lora_generator_roles, build_roles, build_shared_base_roles
from fewstep.distillation.sharding import build_spread, put_weights, spread_of
from fewstep.distillation.start import (
    refuse_other_memory,
    refuse_other_scale,
    refuse_other_taps,
    start_from_dmd2,
    start_others_beside,
)
from fewstep.distillation.terms import (
    DenoisingAndAdversarial,
    DiscriminatorAdversarial,
    DistributionMatching,
    Divergence,
    FakeScoreDenoising,
    FakeScoreTerm,
    GeneratorAdversarial,
    GeneratorTerm,
    Regression,
)
from fewstep.errors import UserError
from fewstep.families.registry import build_released, family_of
from fewstep.formats.compare import state_difference
from fewstep.formats.dmd2_folder import is_dmd2_checkpoint
from fewstep.models.load import load_generator, load_teacher
from fewstep.models.load_in_parts import load_teacher_in_parts
from fewstep.models.model import Model
from fewstep.networks.adapters import LoraShape
from fewstep.networks.frozen_layers import BaseStorage
from fewstep.networks.perceptual import load_lpips, pixel_distance
from fewstep.parallel import world_size
from fewstep.settings import LossSettings, TrainSettings
from fewstep.settings.memory import NO_GPU, MemorySettings
from fewstep.training.checkpoint import list_checkpoints, module_tensors, read_checkpoint, restore_module
from fewstep.training.inputs import build_inputs
from fewstep.training.step import Distillation
from fewstep.training.update import build_update


def build_step_schedule(settings: TrainSettings, teacher: Denoiser) -> StepSchedule:
    """The generator's steps on its teacher's grid.

    Raises:
        UserError: an index the teacher's grid does not have.
    """
    try:
        return StepSchedule.on(teacher.noise_schedule, settings.generator.step_indices)
    except ValueError as error:
        raise UserError(str(error)) from None


def schedule_warning(settings: TrainSettings, teacher: Denoiser) -> list[str]:
    """A line where no scheduler of diffusers can carry the run's steps, as `fewstep export` would say at its end.

    Class-conditional generators bring a scheduler of their own, which carries any steps.
    """
    family = family_of(teacher.describe())
    if not family.scheduler_class:
        return []
    try:
        family.few_step_scheduler(teacher, build_step_schedule(settings, teacher))
    except UserError as error:
        return [f"warning: {error}"]
    return []


def build_distillation(settings: TrainSettings, teacher: Model, conditions: ConditionTable) -> Distillation:
    """Roles, inputs, terms and optimisers of one run.

    Raises:
        UserError: guidance the teacher cannot give, missing pairs or weights, a start that does not fit.
    """
    teacher.check_guidance(settings.teacher.guidance)
    teacher.limit_guidance(settings.teacher.guidance_norm_cap)
    steps, levels = build_step_schedule(settings, teacher.denoiser), teacher.denoiser.noise_schedule.num_levels
    if settings.losses.max_level_index >= levels:
        raise UserError(
            f"losses.level_indices={list(settings.losses.level_indices[:2])}: the teacher's grid ends at {levels - 1}"
        )
    torch.manual_seed(settings.training.seed)  # the head's random start
    roles = build_chosen_roles(settings, teacher.denoiser)
    if settings.generator.start_from:
        start_roles(roles, Path(settings.generator.start_from).expanduser())
    if settings.compute.compile:
        for network in (roles.teacher, roles.generator, roles.fake_score):
            network.compile_network()
    optimizer, training = settings.optimizer, settings.training
    matching = _build_distribution_matching(settings, roles)
    scales = [LossScale.of(teacher.denoiser.compute_dtype, teacher.device) for _ in range(2)]
    return Distillation(
        roles=roles,
        inputs=build_inputs(settings, steps, teacher, conditions),
        generator_terms=_build_generator_terms(settings, roles, teacher, scales[0], matching),
        fake_score_terms=_build_fake_score_terms(settings.losses, roles),
        generator_update=build_update(
            roles.generator_parameters(),
            optimizer.generator_lr,
            optimizer,
            scales[0],
            "generator_",
            modules=[roles.generator],
        ),
        fake_score_update=build_update(
            roles.fake_score_parameters(),
            optimizer.fake_score_lr,
            optimizer,
            scales[1],
            "fake_score_",
            modules=[roles.fake_score, *([roles.discriminator] if roles.discriminator is not None else [])],
        ),
        generator_every=training.generator_every,
        microbatch_size=training.microbatch_size,
        weighed=matching if matching is not None and matching.divergence is not None else None,
    )


def build_chosen_roles(settings: TrainSettings, teacher: Denoiser) -> Roles:
    """Roles in the memory mode of the settings."""
    memory = settings.memory
    with_discriminator = settings.losses.gan_discriminator_weight > 0
    teacher.tap_at(settings.losses.gan_taps)
    storage = base_storage(settings)
    spread = spread_of(teacher, memory.teacher, memory.shard_over)
    if memory.mode == "full":
        roles = build_roles(teacher, with_discriminator, storage, spread)
        if memory.checkpoint_activations:
            for network in (roles.generator, roles.fake_score):
                network.checkpoint_activations()
        return roles
    build = build_shared_base_roles if memory.mode == "shared_base" else build_lora_generator_roles
    return build(teacher, lora_shape(memory), with_discriminator, storage, memory.checkpoint_activations, spread)


def lora_shape(memory: MemorySettings) -> LoraShape:
    """Of each role's LoRA."""
    return LoraShape(memory.lora_rank, memory.lora_alpha, memory.lora_targets, memory.lora_dropout)


def base_storage(settings: TrainSettings) -> BaseStorage:
    """How weights are stored that are never trained."""
    return BaseStorage(settings.memory.base, settings.memory.offload_blocks)


def start_roles(roles: Roles, source: Path) -> None:
    """Start from an earlier run folder (generator, fake score, head where it has one), an exported or converted
    generator (with what lies in its `roles/`), or a DMD2 checkpoint.

    Raises:
        UserError: nothing to start from, another network, LoRAs of another rank or alpha, or a discriminator of other taps.
    """
    checkpoints = list_checkpoints(source / "checkpoints")
    if not checkpoints and is_dmd2_checkpoint(source):
        with _named(source):
            start_from_dmd2(roles, source)
        return
    if not checkpoints:
        earlier = load_generator(source, device="cpu")
        with _named(source):
            refuse_other_scale(earlier.denoiser, roles.generator)
        weights = earlier.denoiser.state_dict()
        if fault := state_difference(weights, roles.generator.state_dict()):
            raise UserError(f"generator.start_from={source} is another network than the teacher: {fault}")
        put_weights(roles.generator, weights)
        with _named(source):
            start_others_beside(roles, source)
        return
    modules: dict[str, nn.Module] = {"generator": roles.generator, "fake_score": roles.fake_score}
    if roles.discriminator is not None:
        modules["discriminator"] = roles.discriminator
    like = {key: value for name, module in modules.items() for key, value in module_tensors(name, module).items()}
    own_parts = like if world_size() > 1 else None
    tensors, _ = read_checkpoint(checkpoints[-1], own_parts, only=tuple(f"{name}." for name in modules))
    with _named(source):
        refuse_other_memory(source, roles)
        for name, module in modules.items():  # a warm-up has a generator alone: the others stay as they are
            if name != "generator" and not any(key.startswith(f"{name}.") for key in tensors):
                continue
            if name == "discriminator":
                refuse_other_taps(source, roles.fake_score)
            restore_module(name, module, tensors)


@contextmanager
def _named(source: Path) -> Iterator[None]:
    """Put the setting before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"generator.start_from={source}: {error}") from None


def open_teacher(settings: TrainSettings) -> Model:
    """The teacher of a run, on its device and in its precision; of several processes each reads its part of it, where it lies in parts.

    Where nothing but adapters is ever trained it is stored as `memory.base` says, layer by layer, before it goes to the
    device, which then never holds it in float32.
    """
    if not settings.teacher.path:
        raise UserError("teacher.path is not set: name a model folder, an EDM .pkl or 'bundled:fashion-mnist'")
    named, place = settings.teacher, choose_device(settings.compute.device)
    if settings.memory.offload_blocks and place.type != "cuda":
        raise UserError(f"memory.teacher='offloaded_blocks' {NO_GPU}")
    in_parts = _open_in_parts(settings)
    teacher = in_parts or load_teacher(named.path, device="cpu", resolution=named.resolution, loras=named.loras)
    if teacher.folder is not None:
        teacher.family.refuse_as_teacher(teacher.folder)
    if in_parts:
        return in_parts
    _prepare_network(settings, teacher.denoiser)
    return teacher.to(settings.compute.device)


def _open_in_parts(settings: TrainSettings) -> Model | None:
    """The teacher of several processes, each of which reads its part; None where it is read whole."""
    named, memory = settings.teacher, settings.memory
    spread = build_spread(choose_device(settings.compute.device), memory.teacher, memory.shard_over)
    if spread is None or not spread.in_parts:
        return None
    prepare = partial(_prepare_network, settings)
    return load_teacher_in_parts(named.path, spread, prepare, resolution=named.resolution, loras=named.loras)


def _prepare_network(settings: TrainSettings, network: Denoiser) -> None:
    """Check a teacher's network, set its precision and how its weights are stored; on the meta device as well.

    Raises:
        UserError: another network than the recipe's.
    """
    if settings.teacher.network:
        check_network(network, settings)
    set_precision(network, settings.compute.precision, choose_device(settings.compute.device))
    if settings.memory.mode == "shared_base":
        base_storage(settings).store(network)


def check_network(network: Denoiser, settings: TrainSettings) -> None:
    """Refuse a teacher of another shape than the recipe was written for (dropout aside: distillation has none)."""
    try:
        expected = build_released(settings.teacher.network).state_dict()
    except ValueError as error:
        raise UserError(str(error)) from None
    if fault := state_difference(network.state_dict(), expected):
        raise UserError(
            f"teacher.path={settings.teacher.path} is no {settings.teacher.network} (teacher.network): {fault}; "
            "set teacher.network='' to use it all the same"
        )


def _build_distribution_matching(settings: TrainSettings, roles: Roles) -> DistributionMatching | None:
    """The term, if the run has it; its divergence, if another than the reverse KL."""
    losses = settings.losses
    if not losses.distribution_matching_weight:
        return None
    divergence = None
    if losses.divergence != "reverse_kl":
        assert roles.discriminator is not None
        weights = DivergenceWeights(losses.divergence, roles.fake_score.noise_schedule.num_levels)
        divergence = Divergence(roles.discriminator, weights.to(next(roles.discriminator.parameters()).device))
    return DistributionMatching(
        roles.teacher, roles.fake_score, settings.teacher.guidance, losses.min_level_index, losses.max_level_index,
        losses.distribution_matching_weight, divergence=divergence, level_shift=losses.level_shift,
    )  # fmt: skip


def _build_generator_terms(
    settings: TrainSettings, roles: Roles, teacher: Model, scale: LossScale, matching: DistributionMatching | None
) -> list[GeneratorTerm]:
    losses, terms = settings.losses, list[GeneratorTerm]([] if matching is None else [matching])
    if losses.gan_generator_weight:
        assert roles.discriminator is not None
        terms.append(
            GeneratorAdversarial(
                roles.fake_score,
                roles.discriminator,
                losses.gan_generator_weight,
                scale=scale,
                max_index=losses.gan_max_level_index,
                beside=matching if losses.gan_levels == "shared" else None,
            )
        )
    if losses.regression_weight:
        terms.append(Regression(build_distance(losses, teacher), losses.regression_weight, scale=scale))
    return terms


def build_distance(losses: LossSettings, teacher: Model) -> Callable[[Tensor, Tensor], Tensor]:
    """What the regression compares in: x0 itself, or LPIPS on pictures (latents are decoded first).

    Raises:
        UserError: weights that are not there.
    """
    if losses.regression_distance == "pixel":
        return pixel_distance
    lpips = load_lpips(losses.vgg_weights, losses.lpips_weights).to(teacher.device)
    decoder = teacher.decoder
    if losses.regression_autoencoder:
        decoder = decoder.with_autoencoder(losses.regression_autoencoder)
    return lambda x0, target: lpips(decoder.pixels(x0), decoder.pixels(target))


def _build_fake_score_terms(losses: LossSettings, roles: Roles) -> list[FakeScoreTerm]:
    denoising = FakeScoreDenoising(roles.fake_score)
    if roles.discriminator is None:
        return [denoising]
    adversarial = DiscriminatorAdversarial(
        roles.fake_score, roles.discriminator, losses.gan_discriminator_weight, max_index=losses.gan_max_level_index
    )
    shared = losses.gan_levels == "shared"
    return [DenoisingAndAdversarial(denoising, adversarial)] if shared else [denoising, adversarial]
