"""Speed of the library's DMD2 step against the plain reading of the method (plain.py), in one run, as ratios.

    python benchmarks/step_speed.py [--cycles 6] [--compile] [--networks quickstart narrow-adm-64]

The plain reading is lean: its networks stop at the bottleneck and what a turn does not train is frozen. Both are
measured in float32 and in bf16. Variants take turns cycle by cycle (one cycle is one generator turn and four others),
each cycle begins with another one, and the medians are compared, because machines are shared and noisy.

Gradients at a trained checkpoint are compared on the same draws: ours in fp32 against plain fp32 (relative error) and
ours in bf16 against plain fp32 (cosine).

"GAN shared" is `losses.gan_levels="shared"`, which the plain reading does not have: another method by a little (docs/quality.md).
"""

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from plain import PlainStep
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.draws import Draws
from fewstep.distillation.inputs import RealBatch
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.families.edm.shapes import build_network_config
from fewstep.formats.model_folder import ModelCard
from fewstep.models.load import load_teacher
from fewstep.models.model import Model, build_model
from fewstep.settings import TrainSettings, parse_settings
from fewstep.training.build import build_distillation
from fewstep.training.step import Distillation, two_time_scale_step

EVERY = 5


def settings(batch_size: int, compile_networks: bool, shared: bool = False) -> TrainSettings:
    """DMD2 with GAN, which reads noisy images of its own or shares those of the scores."""
    return parse_settings(
        TrainSettings,
        {
            "losses": {"gan_weights": [3e-3, 1e-2], "gan_levels": "shared" if shared else 999},
            "optimizer": {"lr": 1e-5},
            "training": {"batch_size": batch_size, "generator_every": EVERY},
            "compute": {"compile": compile_networks},
        },
        "bench",
    )


def build(
    teacher: Model, batch_size: int, precision: str, compile_networks: bool = False, shared: bool = False
) -> Distillation:
    """A fresh distillation whose fake score and generator differ from the teacher, as in the middle of a run."""
    own = build_model(copy.deepcopy(teacher.denoiser), teacher.card)
    own.denoiser.compute_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    run = build_distillation(settings(batch_size, compile_networks, shared), own, own.conditioner.every)
    with torch.no_grad():
        for network, factor in ((run.roles.generator, 0.98), (run.roles.fake_score, 1.02)):
            for parameter in network.parameters():
                parameter.mul_(factor)
    return run


def real_batch(teacher: Model, batch_size: int, step: int) -> RealBatch:
    """Stand-in pictures: speed does not depend on what they show."""
    draws = Draws.of_batch(1, step, batch_size, teacher.device)
    images = draws.normal("diagnostic_noise", teacher.denoiser.image_shape).clamp(-1, 1)
    labels = draws.integers("sample_label", 0, teacher.denoiser.num_classes)
    return RealBatch(images, Condition.from_labels(labels, teacher.denoiser.num_classes))


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(name: str, teacher: Model, batch_size: int, cycles: int, compile_networks: bool) -> None:
    """Time all variants of one network and print the table."""
    variants: dict[str, Callable[[int, RealBatch, Draws], object]] = {}
    for precision, kind in (("fp32", "fp32"), ("bf16", "bf16 autocast")):
        variants[f"plain {kind}"] = PlainStep(build(teacher, batch_size, precision))
        variants[f"fewstep {precision}"] = partial(two_time_scale_step, build(teacher, batch_size, precision))
        shared = build(teacher, batch_size, precision, shared=True)
        variants[f"fewstep {precision}, GAN shared"] = partial(two_time_scale_step, shared)
    if compile_networks:
        compiled = build(teacher, batch_size, "bf16", compile_networks=True)
        variants["fewstep bf16 compiled"] = partial(two_time_scale_step, compiled)
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for cycle in range(cycles + 1):  # the first cycle warms up
        turns = list(variants.items())
        for variant, step_function in turns[cycle % len(turns) :] + turns[: cycle % len(turns)]:
            started = time.perf_counter()
            for step in range(cycle * EVERY, (cycle + 1) * EVERY):
                draws = Draws.of_batch(0, step, batch_size, teacher.device)
                step_function(step, real_batch(teacher, batch_size, step), draws)
            synchronise(teacher.device)
            if cycle:
                seconds[variant].append(time.perf_counter() - started)
    medians = {variant: statistics.median(values) for variant, values in seconds.items()}
    print(f"\n{name}: batch {batch_size}, median of {cycles} cycles of {EVERY} steps")
    print(
        "| variant | images/s | x plain fp32 | x plain bf16 | fastest..slowest cycle |\n| --- | --- | --- | --- | --- |"
    )
    for variant, median in medians.items():
        ratios = (medians[plain] / median for plain in ("plain fp32", "plain bf16 autocast"))
        rate, spread = batch_size * EVERY / median, [batch_size * EVERY / end(seconds[variant]) for end in (min, max)]
        cells = [f"{rate:.1f}", *(f"{ratio:.2f}" for ratio in ratios), f"{spread[0]:.1f}..{spread[1]:.1f}"]
        print(f"| {variant} | {' | '.join(cells)} |", flush=True)


def compare_gradients(name: str, teacher: Model, batch_size: int) -> None:
    """Gradients of generator and fake score: ours against the plain fp32 reading, same weights and draws."""
    reference = _gradients_plain(teacher, batch_size)
    for precision in ("fp32", "bf16"):
        found = _gradients_ours(teacher, batch_size, precision)
        for role, expected in reference.items():
            error = float((found[role] - expected).norm() / expected.norm())
            cosine = float(F.cosine_similarity(found[role], expected, dim=0))
            print(
                f"{name}, {role} gradient, ours {precision} against plain fp32: relative error {error:.1e}, cosine {cosine:.6f}"
            )


def _flat(parameters: list[torch.nn.Parameter]) -> Tensor:
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    ).double()


def _gradients_plain(teacher: Model, batch_size: int) -> dict[str, Tensor]:
    run = build(teacher, batch_size, "fp32")
    plain, kept = PlainStep(run), dict[str, Tensor]()
    _keep(kept, "generator", plain.generator_optimizer)
    _keep(kept, "fake score", plain.fake_score_optimizer)
    plain(0, real_batch(teacher, batch_size, 0), Draws.of_batch(0, 0, batch_size, teacher.device))
    return kept


def _gradients_ours(teacher: Model, batch_size: int, precision: str) -> dict[str, Tensor]:
    """Through the library's own step, with optimisers that keep the gradient instead of applying it."""
    run, kept = build(teacher, batch_size, precision), dict[str, Tensor]()
    for role, update in (("generator", run.generator_update), ("fake score", run.fake_score_update)):
        _keep(kept, role, update.optimizer)
    two_time_scale_step(run, 0, real_batch(teacher, batch_size, 0), Draws.of_batch(0, 0, batch_size, teacher.device))
    return kept


def _keep(kept: dict[str, Tensor], role: str, optimizer: torch.optim.Optimizer) -> None:
    """Let an optimiser note the (clipped) gradient where it would apply it."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.step = lambda *ignored, **named: kept.__setitem__(role, _flat(parameters))  # type: ignore[method-assign]


def narrow_adm(device: str) -> Model:
    """An untrained narrow ADM at 64x64 with 1000 classes."""
    torch.manual_seed(0)
    config = build_network_config("imagenet64-narrow", img_resolution=64, img_channels=3, label_dim=1000)
    denoiser = EDMDenoiser(config).to(device).eval()
    return build_model(denoiser, ModelCard(role="teacher"))


def main() -> None:
    """Run the benchmark and print machine, tables and gradient agreement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=6)
    parser.add_argument("--compile", action="store_true", help="also measure with torch.compile (adds minutes)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--networks", nargs="+", default=["quickstart", "narrow-adm-64"])
    options = parser.parse_args()
    where = (
        torch.cuda.get_device_name()
        if options.device.startswith("cuda")
        else platform.processor() or platform.machine()
    )
    flags = torch.backends.cpu.get_cpu_capability()
    print(f"{where} ({flags}), {torch.get_num_threads()} threads, torch {torch.__version__}")
    if "quickstart" in options.networks:
        teacher = load_teacher("bundled:fashion-mnist", device=options.device)
        measure("quick-start network", teacher, 64, options.cycles, options.compile)
        compare_gradients("quick-start network", teacher, 64)
    if "narrow-adm-64" in options.networks:
        teacher = narrow_adm(options.device)
        measure("narrow ADM 64x64", teacher, 8, max(2, options.cycles // 2), options.compile)


if __name__ == "__main__":
    main()
