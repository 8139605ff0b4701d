"""Distillations of released shapes with random weights, and how one of their steps is measured."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fewstep.diffusion.condition import ClassTable, Condition, ConditionTable
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draws import Draws
from fewstep.distillation.inputs import RealBatch
from fewstep.estimate.stand_ins import teacher_of
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.families.edm.shapes import build_network_config
from fewstep.families.registry import build_denoiser, family_of, released_shapes
from fewstep.settings import TrainSettings, parse_settings
from fewstep.training.build import build_distillation
from fewstep.training.step import Distillation, two_time_scale_step
from fewstep.training.update import Update

EVERY = 5
FOUR_STEPS = (999, 749, 499, 249)


@dataclass(frozen=True)
class Case:
    """One distillation.

    Attributes:
        network: "edm" or a released text-to-image shape, e.g. "sdxl".
        tiny: the same kind of network small enough for a test.
        sgd: SGD in the place of AdamW, whose states would not fit.
        base: how a base under LoRAs is stored; empty: bf16 where the network computes in it.
        offload: its blocks lie in host memory.
        inputs: `generator.training_inputs`.
    """

    network: str
    batch: int
    mode: str = "full"
    checkpoint: bool = False
    precision: str = "bf16"
    guidance: float = 1.0
    steps: tuple[int, ...] = (999,)
    tiny: bool = False
    sgd: bool = False
    base: str = ""
    offload: bool = False
    inputs: str = "simulated"

    @property
    def title(self) -> str:
        """For the first columns of a table."""
        parts = [self.mode, *(["recomputed"] if self.checkpoint else []), *(["SGD"] if self.sgd else [])]
        parts += [*([self.base] if self.base else []), *(["blocks offloaded"] if self.offload else [])]
        return f"{self.network} | {', '.join(parts)} | {self.batch}"


TINY_TEXT: dict[str, Any] = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 64), "cross_attention_dim": 16,
    "attention_head_dim": 4, "norm_num_groups": 8, "transformer_layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
TINY_Z_IMAGE: dict[str, Any] = {
    "family": "z-image", "latent_size": 8, "scheduler": {"num_train_timesteps": 1000, "shift": 6.0},
    "network": {
        "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1,
        "n_heads": 2, "n_kv_heads": 2, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 16, "rope_theta": 256.0,
        "t_scale": 1000.0, "axes_dims": (4, 6, 6), "axes_lens": (1024, 32, 32),
    },
}  # fmt: skip
TINY_ADDED = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 24}


@dataclass(frozen=True)
class RandomPrompts:
    """Embeddings of a few made-up prompts, on the device."""

    table: Condition
    on_host = False

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return len(self.table)

    def rows(self, index: Tensor, device: torch.device | None = None) -> Condition:
        """The conditions at these numbers."""
        return replace(
            self.table, batch_size=len(index), parts={n: part[index] for n, part in self.table.parts.items()}
        )


def describe_network(case: Case) -> dict[str, Any]:
    """The released shape, or a tiny network of its kind."""
    if case.network == "edm":
        if not case.tiny:
            return released_shapes()["imagenet64-adm"]
        return EDMDenoiser(build_network_config("tiny", img_resolution=16, img_channels=3, label_dim=4)).describe()
    released = released_shapes()[case.network]
    if not case.tiny:
        return released
    if case.network == "z-image":
        return TINY_Z_IMAGE
    network = dict(released["network"]) | TINY_TEXT | (TINY_ADDED if case.network == "sdxl" else {})
    return released | {"network": network, "latent_size": 8}


def build_network(case: Case, device: str) -> Denoiser:
    """The network of a case with random weights, made on the device; what will be quantised, in bf16 from the start."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if case.base in ("int8", "nf4") else before)
    try:
        with torch.device(device):
            return build_denoiser(describe_network(case)).eval()
    finally:
        torch.set_default_dtype(before)


def build_conditions(network: Denoiser, device: str) -> ConditionTable:
    """All classes, or random prompts of the family's shapes."""
    family = family_of(network.describe())
    if family.takes == "labels":
        return ClassTable(network.num_classes)
    shaped, made = family.example_condition(network, 16).to(device), torch.Generator(device).manual_seed(1)
    parts = {
        name: torch.randn(part.shape, generator=made, device=device) if part.is_floating_point() else part  # lengths
        for name, part in shaped.parts.items()
    }
    if "time_ids" in parts:
        side = 8.0 * network.image_shape[-1]
        parts["time_ids"] = torch.tensor([[side, side, 0.0, 0.0, side, side]], device=device).expand(16, 6)
    return RandomPrompts(replace(shaped, parts=parts))


def settings_of(case: Case) -> TrainSettings:
    """DMD2 with GAN in the case's memory mode; frozen weights in bf16 where a mode allows it."""
    lora = case.mode != "full"
    return parse_settings(
        TrainSettings,
        {
            "teacher": {"guidance_scale": case.guidance}, "generator": {"step_indices": list(case.steps), "training_inputs": case.inputs},
            "losses": {"gan_weights": [3e-3, 1e-2]},
            "optimizer": {"lr": 1e-5},
            "memory": {
                "mode": case.mode, "checkpoint_activations": case.checkpoint,
                "base": case.base or ("bf16" if lora and case.precision == "bf16" else "fp32"),
                "teacher": "offloaded_blocks" if case.offload else "sharded",
            },
            "training": {"batch_size": case.batch, "generator_every": EVERY},
            "compute": {"precision": case.precision},
        },
        "gpu benchmark",
    )  # fmt: skip


def build_run(case: Case, device: str) -> Distillation:
    """A distillation in the middle of training: its roles differ."""
    network = build_network(case, device)
    network.compute_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[case.precision]
    run = build_distillation(settings_of(case), teacher_of(network), build_conditions(network, device))
    with torch.no_grad():
        for role, factor in ((run.roles.generator, 0.98), (run.roles.fake_score, 1.02)):
            torch._foreach_mul_(list(role.parameters()), factor)
    if case.sgd:
        for update in updates(run):
            update.optimizer = torch.optim.SGD(update.parameters.values(), lr=update.lr)
    return run


def updates(run: Distillation) -> tuple[Update, Update]:
    """Generator's and fake score's."""
    return run.generator_update, run.fake_score_update


StepFunction = Callable[[int, RealBatch, Draws], object]


def our_step(run: Distillation) -> StepFunction:
    """The library's step as a function of step number, real batch and draws."""
    return lambda step, real, draws: two_time_scale_step(run, step, real, draws)


def real_batch(run: Distillation, batch: int, device: str) -> RealBatch:
    """Stand-in pictures with conditions of their own."""
    draws = Draws.of_batch(1, 0, batch, device)
    images = draws.normal("diagnostic_noise", run.roles.teacher.image_shape).clamp(-1, 1)
    conditions = run.inputs.conditions  # type: ignore[attr-defined]
    return RealBatch(images, conditions.rows(draws.integers("sample_label", 0, conditions.num_rows)))


def run_cycle(step_function: StepFunction, real: RealBatch, batch: int, device: str, first: int = 0) -> None:
    """One generator's turn and the others up to the next."""
    for step in range(first, first + EVERY):
        step_function(step, real, Draws.of_batch(0, step, batch, device))


@dataclass
class Measured:
    """What a case costs.

    Attributes:
        milliseconds: a step, median over cycles of one generator's turn and the others.
        peak_gib: most memory the allocator had handed out.
        flops: operations a step, counted; 0: not counted.
    """

    milliseconds: float
    peak_gib: float
    flops: float = 0.0
    cycles: list[float] = field(default_factory=list)

    def utilisation(self, rate: float) -> float:
        """Share of a matrix rate (operations a second) that the counted operations came to."""
        return self.flops / (self.milliseconds / 1e3) / rate if rate else 0.0


def measure(step_function: StepFunction, real: RealBatch, batch: int, device: str, *, seconds: float = 6.0) -> Measured:
    """Warm up for a cycle, then repeat the same cycle for about `seconds`; at least twice, once where they are 0."""
    run_cycle(step_function, real, batch, device)
    synchronise(device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    spent: list[float] = []
    least = 2 if seconds else 1
    while len(spent) < least or (sum(spent) < seconds and len(spent) < 20):
        started = time.perf_counter()
        run_cycle(step_function, real, batch, device)
        synchronise(device)
        spent.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else 0.0
    per_step = [1e3 * cycle / EVERY for cycle in spent]
    return Measured(statistics.median(per_step), peak, cycles=per_step)


def count_flops(run: Distillation, case: Case, device: str) -> float:
    """Operations of one step of the library in the mean over a cycle, counted by torch as they run (recomputed ones too)."""
    real, step_function, counted = real_batch(run, case.batch, device), our_step(run), 0.0
    for step, times in ((0, 1), (1, EVERY - 1)):
        draws = Draws.of_batch(0, step, case.batch, device)
        with FlopCounterMode(display=False) as counter:
            step_function(step, real, draws)
        counted += times * counter.get_total_flops()
    return (counted + _simulation_flops(run, case, real, device)) / EVERY


def _simulation_flops(run: Distillation, case: Case, real: RealBatch, device: str) -> float:
    """What steps 2.. of a cycle simulate more (or less) than step 1, which stood for them."""
    if len(case.steps) == 1:
        return 0.0
    chosen = [Draws.of_batch(0, step, 1).shared_integer("simulated_step", len(case.steps)) for step in range(EVERY)]
    level = run.roles.generator.noise_schedule.expanded(999, case.batch, torch.device(device))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run.roles.generator.denoise(real.images, level, real.condition)
    return float(sum(chosen[1:]) - (EVERY - 1) * chosen[1]) * counter.get_total_flops()


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@contextmanager
def freed() -> Iterator[None]:
    """Give back all device memory before and afterwards, whatever happened."""
    give_back()
    try:
        yield
    finally:
        give_back()


def give_back() -> None:
    """Let go of what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
