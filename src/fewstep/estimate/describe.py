"""What a run would need, found without teacher, data or memory: networks are built on the meta device."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.estimate.calls import Calls
from fewstep.estimate.fits import describe_fits
from fewstep.estimate.many import Layout, describe_processes, find_gpu, own_settings
from fewstep.estimate.memory import (
    AVERAGE,
    FAKE_SCORE_TURN,
    FROZEN,
    GENERATOR_TURN,
    PICTURES,
    STATES,
    TRAINED,
    Estimate,
    estimate_run,
    settled_precision,
)
from fewstep.estimate.stand_ins import teacher_network
from fewstep.families.registry import build_on_meta, describe_new, family_of
from fewstep.formats.lora_list import LoraFile
from fewstep.models.load import check_loras
from fewstep.models.load_in_parts import reads_parts
from fewstep.settings import PretrainSettings, TrainSettings
from fewstep.training.build import schedule_warning
from fewstep.training.pretrain import pictures_of
from fewstep.training.warmup import is_warmup

_GIB = 2**30
_RATE = 200e12
_PCIE = 25e9  # bytes a second from pinned host memory, PCIe 4.0 with 16 lanes
_MODES = {
    "full": "three networks",
    "lora_generator": "generator as LoRA on the frozen teacher, fake score a network of its own",
    "shared_base": "generator and fake score as two LoRAs on the frozen teacher",
}


@dataclass(frozen=True)
class NetworkSize:
    """Counts of one network.

    Attributes:
        parameters: of the network.
        activation_bytes: kept for one sample's backward pass in float32.
    """

    parameters: int
    activation_bytes: int


def network_size(description: dict[str, Any]) -> NetworkSize:
    """Count parameters and the tensors autograd keeps, on the meta device."""
    denoiser = build_on_meta(description).train()
    return NetworkSize(sum(p.numel() for p in denoiser.parameters()), _saved_bytes(denoiser))


def _saved_bytes(denoiser: Denoiser) -> int:
    """Bytes autograd keeps for one sample; each storage once, parameters not."""
    parameters = {parameter.untyped_storage()._cdata for parameter in denoiser.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in parameters:
            saved[key] = tensor  # held, so that no storage address is used twice
        return tensor

    size = 2  # two samples, so that nothing of batch size 1 is special
    condition = family_of(denoiser.describe()).example_condition(denoiser, size).to("meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        noisy = torch.zeros(size, *denoiser.image_shape, device="meta")
        denoiser(noisy, torch.ones(size, device="meta"), condition)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) // size


_UNNAMED = "set teacher.path to a model folder, or teacher.network, to estimate it"
_NOT_YET = "teacher.path={path} is no folder here yet: train, convert or download it first, or set teacher.network, to estimate it"


def describe_distillation(
    settings: TrainSettings, report: Callable[[str], None] = lambda text: None, processes: int = 1, gpu: str = "h100"
) -> Iterator[str]:  # fmt: skip
    """Lines for `fewstep train --dry-run`, each as soon as it is known.

    Args:
        processes: with a card each; more than one are described too.
        gpu: the card's name, one of `many.GPUS`.
        report: called with what is rehearsed next: a released text-to-image model takes up to a minute a memory mode.
    """
    own, gpu = own_settings(settings, processes), find_gpu(gpu)
    found, path = teacher_network(settings), settings.teacher.path
    if found is None:
        for lora in settings.teacher.loras:
            LoraFile.parse(lora)
        yield f"memory: unknown; {_NOT_YET.format(path=path) if path else _UNNAMED}"
        return
    (denoiser, vae), calls = found, Calls()
    check_loras(denoiser, settings.teacher.loras, path or settings.teacher.network)

    def rehearse(settings: TrainSettings, pictures: bool = False) -> Estimate:
        return estimate_run(settings, denoiser, gpu=_on_gpu(settings), autoencoder=vae, pictures=pictures, calls=calls)

    report(f"rehearsing a step and its sample pictures with memory.mode={settings.memory.mode} ...")
    chosen = rehearse(settings, pictures=True)
    yield _describe_network(denoiser, chosen)
    yield from _describe_memory(settings, chosen)
    size, at_once = settings.training.batch_size, settings.training.microbatch_size or settings.training.batch_size

    def peak(number: int) -> int:
        return (chosen if number == at_once else rehearse(_at_once(settings, number))).step

    gradients = 4 * sum(count for role, count in chosen.parameters.items() if role in ("generator", "fake_score"))
    yield describe_fits(peak, gradients, size)
    yield _describe_work(settings, chosen)
    if chosen.on_host:
        yield _describe_moves(settings, chosen)
    if processes > 1:
        report(f"rehearsing the step of one of {processes} processes ...")
        yield from describe_processes(
            Layout(own, denoiser, processes, rehearse(own), reads_parts(settings.teacher.path, denoiser)),
            gpu,
            average_flops(settings, chosen),
        )
    yield from schedule_warning(settings, denoiser)
    if settings.expected:
        yield f"published: {settings.expected}"
    family = family_of(denoiser.describe())
    if not family.lora_targets or is_warmup(settings):  # no LoRA without targets, none in a warm-up
        return
    for mode in _MODES:
        estimate, other = chosen, _in_mode(settings, mode)
        if mode != settings.memory.mode:
            report(f"rehearsing a step with memory.mode={mode} ...")
            estimate = rehearse(other)
        stored = "" if other.memory.base == settings.memory.base else f" (memory.base={other.memory.base})"
        yield f"with memory.mode={mode}: {estimate.step / _GIB:.1f} GiB a step, {_MODES[mode]}{stored}"


def _on_gpu(settings: TrainSettings | PretrainSettings) -> bool:
    """Whether the run is meant for a GPU, this machine having one or not."""
    return settings.compute.device != "cpu"


def _describe_network(denoiser: Denoiser, estimate: Estimate) -> str:
    channels, height, width = denoiser.image_shape
    line = f"network: {estimate.parameters['teacher'] / 1e6:.1f} M parameters, {height}x{width}x{channels}"
    line += " latents" if family_of(denoiser.describe()).autoencoder_config else f", {denoiser.num_classes} classes"
    parts = {"generator": "generator's LoRA", "discriminator": "discriminator"}
    for name, words in parts.items():
        count = estimate.parameters.get(name, 0)
        if count and (name == "discriminator" or count != estimate.parameters["teacher"]):
            line += f"; {words}: {count / 1e6:.1f} M"
    return line


def _describe_memory(settings: TrainSettings, estimate: Estimate) -> list[str]:
    """What lies in memory between steps, what a step adds, their sum, and the sample pictures beside it."""
    kinds = estimate.kinds[estimate.phase]
    resident = {kind: kinds[kind] for kind in (FROZEN, TRAINED, AVERAGE, STATES) if kinds[kind]}
    step = estimate.step - sum(resident.values())
    precision = settled_precision(settings.compute, _on_gpu(settings))
    at_once = settings.training.microbatch_size or settings.training.batch_size
    lines = [
        f"memory for weights, averages and optimiser states: {sum(resident.values()) / _GIB:.1f} GiB ("
        + ", ".join(f"{kind} {size / _GIB:.1f}" for kind, size in resident.items()) + ")",
        f"memory for gradients and activations at batch {at_once} ({precision}, "
        f"one process): {step / _GIB:.1f} GiB in the {estimate.phase}",
        f"estimated peak: {estimate.step / _GIB:.1f} GiB "
        "(a rehearsed step on shapes alone; workspace of the kernels comes on top)",
    ]  # fmt: skip
    if estimate.peaks[PICTURES] > estimate.step:
        lines.append(
            f"sample pictures need more: {estimate.peaks[PICTURES] / _GIB:.1f} GiB with run.samples="
            f"{list(settings.run.samples)}"
        )
    return lines


def _at_once(settings: TrainSettings, number: int) -> TrainSettings:
    """The settings with so many samples going through the networks at once."""
    return settings.model_copy(update={"training": settings.training.model_copy(update={"microbatch_size": number})})


def average_flops(settings: TrainSettings, estimate: Estimate) -> float:
    """Floating-point operations of an average step.

    Every step draws its samples: with gradients on the generator's turns, which are rehearsed, without on the others.
    """
    training = settings.training
    every = 1 if is_warmup(settings) else training.generator_every
    drawn = training.batch_size * estimate.forward_flops * _drawn_forwards(settings, every, 0.5)
    return estimate.flops[GENERATOR_TURN] / every + estimate.flops.get(FAKE_SCORE_TURN, 0) + drawn


def _drawn_forwards(settings: TrainSettings, every: int, share: float) -> float:
    """Forwards of the generator in an average step that no rehearsed turn has: samples without gradients, and steps before theirs.

    A batch at one step has half of the earlier ones behind it on average. Where a batch holds all steps, each earlier one is a
    forward of half the samples on average, which counts `share` of a whole one. Noised data and pairs have none.
    """
    one = {"simulated": 0.5, "simulated_per_sample": share, "noised_data": 0.0}[settings.generator.training_inputs]
    earlier = 0 if is_warmup(settings) else len(settings.generator.step_indices) - 1
    return (1 - 1 / every) + earlier * one


def _describe_work(settings: TrainSettings, estimate: Estimate) -> str:
    """What the run takes at a stated rate."""
    training, flops = settings.training, average_flops(settings, estimate)
    hours = flops * training.num_steps / _RATE / 3600
    return (
        f"work: {flops / 1e12:.3g} TFLOP a step on average; {training.num_steps:,} steps take {hours:,.1f} hours at "
        f"{_RATE / 1e12:.0f} TFLOP/s (a fifth of what an H100 can do in bf16)"
    )


def average_moves(settings: TrainSettings, estimate: Estimate) -> float:
    """Bytes of the base that an average step copies to the device: each forward and each recomputation all that it runs.

    Generator and fake score take turns, and samples are drawn, as in `average_flops`; a forward of part of a batch moves as much.
    """
    training = settings.training
    every, moved = training.generator_every, estimate.moved
    parts = -(-training.batch_size // (training.microbatch_size or training.batch_size))
    drawn = parts * estimate.on_host * _drawn_forwards(settings, every, 1.0)
    return moved[GENERATOR_TURN] / every + moved[FAKE_SCORE_TURN] + drawn


def _describe_moves(settings: TrainSettings, estimate: Estimate) -> str:
    """What offloaded blocks cost."""
    moved = average_moves(settings, estimate)
    return (
        f"memory.teacher='offloaded_blocks': {estimate.on_host / _GIB:.1f} GiB of the base stay in host memory, and {moved / 1e9:.3g} GB a step on average go "
        f"to the GPU, {moved / _PCIE:.2g} s at {_PCIE / 1e9:.0f} GB/s (PCIe 4.0 with 16 lanes, not measured), in which it does not compute"
    )


def _in_mode(settings: TrainSettings, mode: str) -> TrainSettings:
    """The settings in another memory mode; what only LoRAs allow is left out where whole networks are trained."""
    memory: dict[str, Any] = {"mode": mode}
    if mode == "full":
        if settings.memory.offload_blocks:
            memory["teacher"] = "sharded"
        memory |= {"base": "fp32" if settings.memory.base == "fp32" else "bf16"}
    return settings.model_copy(update={"memory": settings.memory.model_copy(update=memory)})


def describe_pretraining(settings: PretrainSettings) -> list[str]:
    """Lines for `fewstep pretrain --dry-run`."""
    try:
        description = describe_new(settings.network.name, pictures_of(settings))
    except ValueError as error:
        raise UserError(str(error)) from None
    size = network_size(description)
    precision = settled_precision(settings.compute, _on_gpu(settings))
    half = 1.0 if precision == "fp32" else 0.5
    states = size.parameters * 4 * 4
    graph = size.activation_bytes * settings.training.batch_size * half + size.parameters * 4
    return [
        f"network: {size.parameters / 1e6:.1f} M parameters",
        f"estimated peak: {(states + graph) / _GIB:.1f} GiB at batch {settings.training.batch_size} "
        f"({precision}; counted on the meta device; workspace of the kernels comes on top)",
    ]
