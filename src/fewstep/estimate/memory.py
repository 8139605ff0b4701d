"""What a run would need: its real networks, terms, optimisers and step, rehearsed once on a machine without memory.

torch's own `torch.distributed._tools.MemTracker` was tried first, on fake tensors, and cannot follow a distillation: it
reads no host number of a fake tensor, hooks the gradient of every parameter where a teacher's are frozen, and, with
both worked around, refuses a network that is called several times a step ("multiple iterative calls"). So the meter is
ours. It is within 10% of measured steps in every memory mode (tests/estimate/test_memory.py).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewstep.devices import DTYPES, choose_precision
from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser, guided_denoise
from fewstep.distillation.inputs import FreshAndPairedInputs, FreshInputs, PairedInputs, RealBatch
from fewstep.distillation.roles import build_twin
from fewstep.distillation.terms import FakeScoreTerm, Regression
from fewstep.errors import UserError
from fewstep.estimate.calls import Calls
from fewstep.estimate.machine import meta_machine
from fewstep.estimate.meter import Meter
from fewstep.estimate.stand_ins import (
    Pairs,
    conditions_of,
    teacher_network,
    teacher_of,
    untrained_distance,
)
from fewstep.families.registry import build_on_meta, family_of
from fewstep.models.model import Model
from fewstep.networks.frozen_layers import host_tensors
from fewstep.settings import ComputeSettings, TrainSettings
from fewstep.training.build import build_distillation, build_step_schedule
from fewstep.training.distill import DistillationJob
from fewstep.training.ema import WeightAverage
from fewstep.training.update import build_update
from fewstep.training.warmup import WarmupJob, is_warmup

GENERATOR_TURN, FAKE_SCORE_TURN, PICTURES = "generator's turn", "fake score's turn", "sample pictures"
FROZEN, TRAINED, AVERAGE, STATES, GRADIENTS = "frozen", "trained", "average", "optimiser states", "gradients"


@dataclass
class Estimate:
    """Bytes of tensors, and arithmetic, in each phase of a run.

    Attributes:
        peaks: by phase, the largest sum of all live tensors.
        kinds: by phase, what that sum is made of: FROZEN, TRAINED, AVERAGE, STATES, GRADIENTS, ACTIVATIONS.
        flops: by phase of a step, floating-point operations.
        forward_flops: of one sample's forward through the teacher, where pictures are rehearsed.
        parameters: of the teacher, of what each optimiser trains ("generator", "fake_score"), of the "discriminator".
        moved: by phase of a step, bytes that are copied from host memory to the device (`memory.teacher = "offloaded_blocks"`).
        on_host: bytes of the base that lie in host memory.
    """

    peaks: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    forward_flops: int = 0
    parameters: dict[str, int] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    on_host: int = 0

    @property
    def phase(self) -> str:
        """The phase of a step that needs most."""
        return max((GENERATOR_TURN, FAKE_SCORE_TURN), key=lambda phase: self.peaks.get(phase, 0))

    @property
    def step(self) -> int:
        """Peak of a training step in bytes."""
        return self.peaks[self.phase]

    def close(self, phase: str, meter: Meter, waiting: "Waiting | None" = None) -> None:
        """Note the peak since the last phase as this phase's; `waiting`: gradients that waited in it."""
        self.peaks[phase], self.kinds[phase], self.flops[phase] = meter.peak, meter.at_peak.copy(), meter.flops
        if waiting is not None:
            self.peaks[phase] -= waiting.unmet
            self.kinds[phase][GRADIENTS] -= waiting.unmet
        self.moved[phase] = meter.moved
        meter.start_phase()


def estimate_run(
    settings: TrainSettings, denoiser: Denoiser | None = None, *, gpu: bool = True,
    autoencoder: dict[str, Any] | None = None, pictures: bool = True, calls: Calls | None = None,
) -> Estimate:  # fmt: skip
    """Rehearse one step of a run, generator's turn included, and its sample pictures.

    Kernel workspaces, the allocator's rounding and the CUDA context come on top. Neither the teacher's weights nor
    data are read; `generator.start_from` and `compute.compile` are ignored. Of micro-batches one is rehearsed, which
    meets the gradients of those before it: the samples and conditions of others, which wait beside it, are not counted.

    Args:
        denoiser: the teacher on the meta device, left as it is; None: the one that the settings name, VAE included.
        gpu: count as on a GPU (autocast normalises in float32 there).
        autoencoder: config of a text-to-image model's VAE, which stays on the device for pictures.
        pictures: whether to rehearse the sample pictures too.
        calls: shapes worked out by an earlier rehearsal of the same teacher, and by this one.

    Raises:
        UserError: no teacher is given, and the settings name none that is known.
    """
    if denoiser is None:
        found = teacher_network(settings)
        if found is None:
            raise UserError("set teacher.path to a model folder, or teacher.network, to estimate what a run needs")
        denoiser, autoencoder = found
    whole = settings.training.batch_size
    size = min(whole, (settings.training.microbatch_size or whole) * _num_rehearsed(settings))
    settings = settings.model_copy(
        update={
            "generator": settings.generator.model_copy(update={"start_from": ""}),
            "compute": settings.compute.model_copy(update={"compile": False}),
            "training": settings.training.model_copy(update={"batch_size": size}),
        }
    )
    precision = settled_precision(settings.compute, gpu)
    estimate, network = Estimate(), build_on_meta(denoiser.describe())
    with meta_machine(gpu, calls) as meter:
        network.eval()
        network.compute_dtype = DTYPES[precision]
        estimate.parameters["teacher"] = _count(network.parameters())
        vae = None if autoencoder is None else family_of(denoiser.describe()).build_autoencoder(autoencoder)
        if vae is not None:
            meter.assign(FROZEN, vae.parameters())
        teacher = teacher_of(network, vae)
        if is_warmup(settings):
            job = _rehearse_warmup(settings, teacher, meter, estimate, size < whole)
        else:
            job = _rehearse_distillation(settings, teacher, meter, estimate, size < whole)
        if pictures:
            _rehearse_pictures(settings, teacher, gpu, meter, estimate)
            estimate.close(PICTURES, meter)
        estimate.flops = {phase: count * whole // size for phase, count in estimate.flops.items()}
        estimate.moved = {phase: count * whole // size for phase, count in estimate.moved.items()}
        del job  # until here: what it holds lies in memory beside the pictures
    return estimate


def _num_rehearsed(settings: TrainSettings) -> int:
    """Micro-batches of a step: one that meets the gradients of others; two where a divergence looks at all of them before."""
    return 1 if settings.losses.divergence == "reverse_kl" else 2


def settled_precision(compute: ComputeSettings, gpu: bool) -> str:
    """The precision a run would have: "auto" is bf16 on a GPU, on the CPU what is fast here."""
    if compute.precision == "auto" and gpu:
        return "bf16"
    return choose_precision(compute.precision, torch.device("cpu"))


@dataclass
class Waiting:
    """Gradients of one role from earlier micro-batches, which wait while another one is rehearsed."""

    parameters: list[nn.Parameter]
    meter: Meter
    left: set[nn.Parameter] = field(default_factory=set)

    def begin(self, exist: bool) -> None:
        """Watch which gradients are made; `exist`: all are there already."""
        self.left = set(self.parameters) if exist else set()
        for parameter in self.left:
            parameter.grad = torch.zeros_like(parameter)
            self.meter.assign(GRADIENTS, [parameter.grad])

    def meet(self, parameter: nn.Parameter) -> None:
        """A gradient was made, or added to the one that waited."""
        self.left.discard(parameter)
        if parameter.grad is not None:
            self.meter.assign(GRADIENTS, [parameter.grad])

    @property
    def unmet(self) -> int:
        """Bytes that waited for nothing: what nothing is made of, as the caption's stream behind a last block, gets no gradient."""
        return sum(parameter.nbytes for parameter in self.left)


def _rehearse_distillation(
    settings: TrainSettings, teacher: Model, meter: Meter, estimate: Estimate, is_part: bool
) -> SimpleNamespace:
    conditions = conditions_of(teacher.denoiser)
    losses = settings.losses
    plain = losses.model_copy(update={"regression_weight": 0.0})
    run = build_distillation(settings.model_copy(update={"losses": plain}), teacher, conditions)
    if losses.regression_weight:  # its pairs and the weights of its distance are files: stand-ins of their shapes
        steps = build_step_schedule(settings, teacher.denoiser)
        pairs = PairedInputs(steps, conditions, cast(Any, Pairs(teacher.denoiser.image_shape)))
        run.inputs = FreshAndPairedInputs(FreshInputs(steps, conditions), pairs)
        run.generator_terms.append(Regression(untrained_distance(settings, teacher), losses.regression_weight))
    roles = run.roles
    average = _average(settings, roles.generator)
    head = roles.discriminator
    estimate.parameters["discriminator"] = _count(head.parameters()) if head is not None else 0
    optimizers = {"generator": run.generator_update.optimizer, "fake_score": run.fake_score_update.optimizer}
    waiting = _prepare(teacher.denoiser, average, optimizers, meter, estimate)

    def turn() -> None:
        estimate.close(GENERATOR_TURN, meter, waiting["generator"])
        waiting["fake_score"].begin(is_part)

    waiting["generator"].begin(is_part)
    run.fake_score_terms[0] = _Announced(run.fake_score_terms[0], turn)
    size, device = settings.training.batch_size, teacher.device
    count = size if losses.gan_discriminator_weight else 0
    rows = torch.zeros(count, dtype=torch.int64)
    real = RealBatch(
        torch.zeros(count, *teacher.denoiser.image_shape), conditions.rows(rows) if count else Condition(0)
    )
    job = SimpleNamespace(
        settings=settings, run=run, device=device, average=average, generator=roles.generator, teacher=teacher,
        _real_batch=lambda step: real,
    )  # fmt: skip
    DistillationJob.step(cast(Any, job), 0, 0.0)
    estimate.close(FAKE_SCORE_TURN, meter, waiting["fake_score"])
    return job


def _rehearse_warmup(
    settings: TrainSettings, teacher: Model, meter: Meter, estimate: Estimate, is_part: bool
) -> SimpleNamespace:
    steps, denoiser = build_step_schedule(settings, teacher.denoiser), teacher.denoiser
    denoiser.requires_grad_(False)
    generator = build_twin(denoiser, "generator").requires_grad_(True)
    if settings.memory.checkpoint_activations:
        generator.checkpoint_activations()
    average = _average(settings, generator)
    update = build_update(dict(generator.named_parameters()), 1e-5, settings.optimizer, prefix="generator_")
    waiting = _prepare(denoiser, average, {"generator": update.optimizer}, meter, estimate)["generator"]
    waiting.begin(is_part)
    job = SimpleNamespace(
        settings=settings, device=teacher.device, generator=generator, average=average, update=update,
        inputs=PairedInputs(steps, conditions_of(denoiser), cast(Any, Pairs(denoiser.image_shape))),
        terms=[Regression(untrained_distance(settings, teacher), settings.losses.regression_weight)],
        _no_data=RealBatch(torch.zeros(0, *denoiser.image_shape), Condition(0)),
    )  # fmt: skip
    WarmupJob.step(cast(Any, job), 0, 0.0)
    estimate.close(GENERATOR_TURN, meter, waiting)
    return job


@torch.no_grad()
def _rehearse_pictures(settings: TrainSettings, teacher: Model, gpu: bool, meter: Meter, estimate: Estimate) -> None:
    """The largest forward of the first sample pictures, and for latents the decoder, beside what is finished."""
    count, network = settings.run.sample_images, teacher.denoiser
    finished = [torch.zeros(count, *network.image_shape)]  # x0 of all; on a GPU their pictures go to the host
    if not gpu:
        finished.append(torch.zeros(count, *teacher.picture_shape))
    index = torch.zeros(min(count, teacher.pictures_at_once), dtype=torch.int64)
    noisy, condition = torch.zeros(len(index), *network.image_shape), conditions_of(network).rows(index)
    level = network.noise_schedule.at(index)
    x0 = guided_denoise(network, noisy, level, condition, settings.teacher.guidance)
    estimate.forward_flops = meter.flops // (len(index) * (1 if settings.teacher.guidance == 1 else 2))
    teacher.decoder.images(x0)
    del finished


def _prepare(
    teacher: Denoiser, average: WeightAverage[Denoiser] | None, optimizers: Mapping[str, torch.optim.Optimizer],
    meter: Meter, estimate: Estimate,
) -> dict[str, Waiting]:  # fmt: skip
    """Name the kinds of what lies in memory between steps, and let the optimisers make their states; each one's gradients."""
    waiting: dict[str, Waiting] = {}
    meter.assign(FROZEN, [parameter for parameter in teacher.parameters() if not parameter.requires_grad])
    meter.assign(FROZEN, teacher.buffers())  # codes and scales of a quantised base
    meter.leave_out(host_tensors(teacher))
    estimate.on_host = sum(part.nbytes for part in host_tensors(teacher))
    if average is not None:
        meter.assign(AVERAGE, average.module.parameters())
    for name, optimizer in optimizers.items():
        parameters = optimizer.param_groups[0]["params"]
        estimate.parameters[name] = _count(parameters)
        waiting[name] = Waiting(parameters, meter)
        meter.assign(TRAINED, parameters)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.assign(STATES, [value for state in optimizer.state.values() for value in state.values()])
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(waiting[name].meet)
    meter.start_phase()
    return waiting


@dataclass
class _Announced:
    """A term that says when it is first reached: the generator's turn is over then."""

    term: FakeScoreTerm
    announce: Callable[[], None]
    is_reached: bool = False

    @property
    def weights(self) -> dict[str, float]:
        return self.term.weights

    def __call__(self, x0: Tensor, condition: Condition, real: RealBatch, draws: Any) -> dict[str, Tensor]:
        if not self.is_reached:
            self.is_reached = True
            self.announce()
        return self.term(x0, condition, real, draws)


def _average(settings: TrainSettings, generator: Denoiser) -> WeightAverage[Denoiser] | None:
    half_life = settings.generator.ema_half_life_images
    return WeightAverage(build_twin(generator, "average"), half_life) if half_life else None


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
