"""What each single choice is worth, on the EDM network's step, everything else as the library does it."""

import contextlib
import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from gpu_parts import timed
from gpu_runs import Case, build_run, freed, measure, our_step, real_batch, synchronise, updates
from torch import Tensor, nn

from fewstep.diffusion import draws
from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draws import Draws
from fewstep.distillation import terms
from fewstep.training.step import Distillation

CASE = Case("edm", 40, guidance=2.0)  # guided, so that the two rows of guidance can be told apart


def levers(bench: Any) -> None:
    """Milliseconds a step with one choice undone (or added), and the ratio to the step as it is."""
    case = replace(CASE, tiny=True, batch=2) if bench.tiny else CASE
    with freed():
        run = build_run(case, bench.device)
        seconds = 0.0 if bench.tiny else 2.5
        real = real_batch(run, case.batch, bench.device)

        def time_step(name: str, context: Any) -> float:
            try:
                with context:
                    found = measure(our_step(run), real, case.batch, bench.device, seconds=seconds)
            except (RuntimeError, TypeError, NotImplementedError) as error:
                bench.note(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
                gc.collect()
                return 0.0
            base = bench.facts.setdefault("edm_guided_ms", found.milliseconds)
            bench.add(
                lever=name,
                ms=found.milliseconds,
                **{"x as it is": found.milliseconds / base, "peak GiB": found.peak_gib},
            )
            return found.milliseconds

        time_step(
            "as it is: bf16, fused attention, guided rows in one batch, one encoder pass", contextlib.nullcontext()
        )
        time_step("attention unfused", unfused_attention())
        time_step("guided and unguided rows apart", mock.patch.object(terms, "guided_denoise", guided_apart))
        time_step(
            "real and generated images apart", mock.patch.object(terms.DiscriminatorAdversarial, "at", encoder_apart)
        )
        time_step("draws made on the CPU and copied", draws_on_the_cpu(bench.device))
        time_step("draws unfused on the device", mock.patch.object(draws, "fused_draws", return_value=None))
        time_step("optimisers not fused", unfused_optimizers(run))
        time_step("float32 inside the networks (TF32 in convolutions, torch's default)", precision(run, torch.float32))
        time_step("float32 with TF32 matrix products", tf32(run))
        time_step("fp16 inside the networks (no loss scale)", precision(run, torch.float16))
        time_step("frozen teacher stored in bf16", teacher_in_bf16(run))
        time_step("cuDNN chooses kernels by timing them", cudnn_benchmark())
        time_step("group norms write bf16", mock.patch.object(nn.GroupNorm, "forward", norm_as_input))
        time_step("channels last", channels_last(run))
        time_step("channels last, group norms write bf16, cuDNN chooses", together(run))
        eight_bit(bench, run, time_step)
    with freed():
        graphs(bench)


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Plain matrix products and softmax."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def guided_apart(network: Denoiser, noisy: Tensor, level: Tensor, condition: Condition, scale: float) -> Tensor:
    """Guidance in two forwards."""
    unconditional = network.denoise(noisy, level, condition.unconditional())
    return unconditional + scale * (network.denoise(noisy, level, condition) - unconditional)


def encoder_apart(
    term: Any, x0: Tensor, condition: Condition, real: Any, real_index: Tensor, real_noise: Tensor,
    generated_index: Tensor, generated_noise: Tensor,
) -> Tensor:  # fmt: skip
    """The discriminator's term with two encoder passes."""
    parts = []
    for images, own, index, noise in (
        (real.images, real.condition, real_index, real_noise), (x0, condition, generated_index, generated_noise),
    ):  # fmt: skip
        level = term.fake_score.noise_schedule.at(index)
        noisy = term.fake_score.add_noise(images, noise, level)
        parts.append(term.discriminator(term.fake_score.features(noisy, level, own)[0]))
    return terms.discriminator_adversarial_loss(*parts)


@contextmanager
def draws_on_the_cpu(device: str) -> Iterator[None]:
    """Every number drawn on the host and copied."""
    plain = {name: getattr(Draws, name) for name in ("normal", "integers")}

    def copied(name: str) -> Callable[..., Tensor]:
        def draw(self: Draws, *arguments: Any, **options: Any) -> Tensor:
            host = Draws(self.seed, self.step, torch.arange(len(self.positions)))
            return plain[name](host, *arguments, **options).to(device)

        return draw

    with mock.patch.object(Draws, "normal", copied("normal")), mock.patch.object(Draws, "integers", copied("integers")):
        yield


@contextmanager
def unfused_optimizers(run: Distillation) -> Iterator[None]:
    """One kernel an operation and group of tensors, torch's default on CUDA."""
    groups = [group for update in updates(run) for group in update.optimizer.param_groups]
    for group in groups:
        group["fused"], group["foreach"] = False, True
    try:
        yield
    finally:
        for group in groups:
            group["fused"], group["foreach"] = True, None


@contextmanager
def precision(run: Distillation, dtype: torch.dtype) -> Iterator[None]:
    """Another precision inside all networks."""
    networks = (run.roles.teacher, run.roles.generator, run.roles.fake_score)
    earlier = networks[0].compute_dtype
    for network in networks:
        network.compute_dtype = dtype
    try:
        yield
    finally:
        for network in networks:
            network.compute_dtype = earlier


@contextmanager
def tf32(run: Distillation) -> Iterator[None]:
    """float32 whose matrix products take 10 bits of mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with precision(run, torch.float32):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@contextmanager
def teacher_in_bf16(run: Distillation) -> Iterator[None]:
    """The frozen network without its float32 weights."""
    run.roles.teacher.to(torch.bfloat16)
    try:
        yield
    finally:
        run.roles.teacher.float()


@contextmanager
def channels_last(run: Distillation) -> Iterator[None]:
    """Weights of convolutions with their channels innermost; activations follow."""
    networks: list[nn.Module] = [run.roles.teacher, run.roles.generator, run.roles.fake_score]

    def change(memory_format: torch.memory_format) -> None:
        for network in networks:
            network.to(memory_format=memory_format)
        for update in updates(run):
            update.optimizer.state.clear()  # a fused optimiser wants its states laid out as the weights are

    change(torch.channels_last)
    try:
        yield
    finally:
        change(torch.contiguous_format)


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """Convolution kernels by trial."""
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False


def norm_as_input(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """A group norm whose output has its input's precision; autocast on CUDA makes it float32."""
    with torch.autocast(x.device.type, enabled=False):
        weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
        return nn.functional.group_norm(x, norm.num_groups, weight, bias, norm.eps)


@contextmanager
def together(run: Distillation) -> Iterator[None]:
    """Three at once."""
    with cudnn_benchmark(), mock.patch.object(nn.GroupNorm, "forward", norm_as_input), channels_last(run):
        yield


def eight_bit(bench: Any, run: Distillation, time_step: Callable[..., float]) -> None:
    """AdamW with states of 8 bits, where torchao is installed."""
    if importlib.util.find_spec("torchao") is None:
        bench.note("8-bit optimiser: not measured, torchao is not installed")
        return
    from torchao.optim import AdamW8bit

    earlier = [update.optimizer for update in updates(run)]
    for update in updates(run):
        update.optimizer = AdamW8bit(list(update.parameters.values()), lr=update.lr)
    time_step("AdamW with 8-bit states (torchao)", contextlib.nullcontext())
    for update, optimizer in zip(updates(run), earlier, strict=True):
        update.optimizer = optimizer


def graphs(bench: Any) -> None:
    """The teacher's forward replayed as a CUDA graph: what launches cost where shapes allow it."""
    if not bench.device.startswith("cuda"):
        return
    for batch in (4, 40):
        with freed():
            forward = teacher_forward(replace(CASE, batch=batch, tiny=bench.tiny), bench.device)
            eager = timed(forward, bench.device, 10)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                forward()
            replayed = timed(graph.replay, bench.device, 10)
            bench.note(
                f"teacher's forward, batch {batch}: {1e3 * eager:.1f} ms eager, {1e3 * replayed:.1f} ms as a CUDA graph"
            )
            del graph, forward


def teacher_forward(case: Case, device: str, *, by_block: bool = False) -> Callable[[], object]:
    """The teacher's x0 estimate of one batch, without gradients; its blocks compiled where asked."""
    run = build_run(case, device)
    teacher, real = run.roles.teacher, real_batch(run, case.batch, device)
    level = teacher.noise_schedule.expanded(500, case.batch, real.images.device).clone()
    if by_block:
        limits: Any = torch._dynamo.config
        limits.recompile_limit = 128
        for module in teacher.modules():
            if type(module).__name__ == "UNetBlock":
                module.compile(dynamic=False)

    def forward() -> object:
        with torch.no_grad():
            return teacher.denoise(real.images, level, real.condition)

    return forward


def compiled(bench: Any) -> None:
    """The teacher's forward eager and compiled block by block; compiling is on the clock too."""
    case = replace(CASE, tiny=True, batch=2) if bench.tiny else CASE
    with freed():
        eager = timed(teacher_forward(case, bench.device), bench.device, 2 if bench.tiny else 10)
        bench.add(teacher="eager", ms=1e3 * eager)
    with freed():
        forward = teacher_forward(case, bench.device, by_block=not bench.tiny)
        started = time.monotonic()
        forward()
        synchronise(bench.device)
        spent = time.monotonic() - started
        fast = timed(forward, bench.device, 2 if bench.tiny else 10)
        bench.add(teacher="compiled block by block", ms=1e3 * fast, **{"compiling s": spent, "x eager": fast / eager})
