"""Speed of the library's DMD2 step against the plain reading of the method, in one run, as ratios.

    python benchmarks/step_speed.py [--cycles 6] [--compile] [--networks quickstart narrow-adm-64]

Plain reading: three roles, eager, a full network forward wherever a feature is needed (the bottleneck is caught on the
way), real and generated images in separate forwards, one backward through everything with leaked gradients dropped,
default AdamW. Measured in float32 and under bf16 autocast. Variants take turns cycle by cycle (one cycle is one generator turn and
four others), and the medians are compared, because machines are shared and noisy.

Gradients at a trained checkpoint are compared on the same draws: ours in fp32 against plain fp32 (relative error) and
ours in bf16 against plain fp32 (cosine).
"""

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.draws import Draws
from fewstep.distillation.inputs import RealBatch
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.families.edm.preconditioning import edm_preconditioning
from fewstep.families.edm.shapes import build_network_config
from fewstep.formats.model_folder import ModelCard
from fewstep.models.load import load_teacher
from fewstep.models.model import Model, build_model
from fewstep.settings import TrainSettings, parse_settings
from fewstep.training.build import build_distillation
from fewstep.training.step import Distillation, two_time_scale_step

EVERY = 5


class PlainStep:
    """METHOD section 3 as one would first write it down, on the same networks and draws."""

    def __init__(self, run: Distillation, bf16: bool) -> None:
        self.teacher, self.generator, self.fake = run.roles.teacher, run.roles.generator, run.roles.fake_score
        self.head, self.bf16 = run.roles.discriminator, bf16
        self.gen_optimizer = torch.optim.AdamW(self.generator.parameters(), lr=1e-5, weight_decay=0.01)
        guidance = [*self.fake.parameters(), *self.head.parameters()]
        self.fake_optimizer = torch.optim.AdamW(guidance, lr=1e-5, weight_decay=0.01)

    def denoise(self, net: EDMDenoiser, noisy: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """x0 and the bottleneck, which a hook catches on the way through the whole network."""
        caught: list[Tensor] = []
        hook = list(net.model.enc.values())[-1].register_forward_hook(lambda *args: caught.append(args[2]))
        s = sigma[:, None, None, None]
        c = edm_preconditioning(s, net.sigma_data)
        with torch.autocast(noisy.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            raw, _ = net.model(c.c_in * noisy, c.c_noise.flatten(), labels)
        hook.remove()
        return c.c_skip * noisy + c.c_out * raw.float(), caught[0].float()

    def noised(
        self, x: Tensor, draws: Draws, level: str, noise: str, low: int = 0, high: int = 1000
    ) -> tuple[Tensor, Tensor]:
        """Images at their own random levels."""
        sigma = self.teacher.noise_schedule.at(draws.integers(level, low, high))
        return x + sigma[:, None, None, None] * draws.normal(noise, self.teacher.image_shape), sigma

    def generate(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Generator images and their labels."""
        classes = self.teacher.num_classes
        labels = F.one_hot(draws.integers("generator_label", 0, classes), classes).float()
        noise = draws.normal("generator_noise", self.teacher.image_shape)
        x, _ = self.denoise(self.generator, 80 * noise, torch.full((len(noise),), 80.0, device=noise.device), labels)
        return x, labels

    def generator_loss(self, x: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """Distribution matching and GAN loss of the generator."""
        with torch.no_grad():
            noisy, sigma = self.noised(x, draws, "dm_level", "dm_noise", 20, 981)
            real, _ = self.denoise(self.teacher, noisy, sigma, labels)
            fake, _ = self.denoise(self.fake, noisy, sigma, labels)
            grad = (fake - real) / (x - real).abs().mean(dim=(1, 2, 3), keepdim=True)
        loss = 0.5 * F.mse_loss(x, (x - grad).detach())
        noisy, sigma = self.noised(x, draws, "gan_level", "gan_noise")
        return loss + 3e-3 * F.softplus(-self.head(self.denoise(self.fake, noisy, sigma, labels)[1])).mean()

    def fake_loss(self, x: Tensor, labels: Tensor, real: RealBatch, draws: Draws) -> Tensor:
        """Denoising and discriminator loss."""
        noisy, sigma = self.noised(x, draws, "fake_level", "fake_noise")
        estimate, _ = self.denoise(self.fake, noisy, sigma, labels)
        weight = (sigma**-2 + 0.5**-2)[:, None, None, None]
        loss = (weight * (estimate - x) ** 2).mean()
        noisy, sigma = self.noised(real.images, draws, "disc_level_real", "disc_noise_real")
        on_real = self.head(self.denoise(self.fake, noisy, sigma, real.condition["class_labels"])[1])
        noisy, sigma = self.noised(x, draws, "disc_level_generated", "disc_noise_generated")
        on_generated = self.head(self.denoise(self.fake, noisy, sigma, labels)[1])
        return loss + 1e-2 * (F.softplus(-on_real).mean() + F.softplus(on_generated).mean())

    def step(self, step: int, real: RealBatch, draws: Draws) -> None:
        """One two time-scale step."""
        if step % EVERY == 0:
            x, labels = self.generate(draws)
            self.generator_loss(x, labels, draws).backward()
            torch.nn.utils.clip_grad_norm_(self.generator.parameters(), 10)
            self.gen_optimizer.step()
            self.gen_optimizer.zero_grad()
            self.fake_optimizer.zero_grad()  # what leaked
        else:
            with torch.no_grad():
                x, labels = self.generate(draws)
        self.fake_loss(x.detach(), labels, real, draws).backward()
        torch.nn.utils.clip_grad_norm_([*self.fake.parameters(), *self.head.parameters()], 10)
        self.fake_optimizer.step()
        self.fake_optimizer.zero_grad()


def settings(batch_size: int, compile_networks: bool) -> TrainSettings:
    """DMD2 with GAN."""
    return parse_settings(
        TrainSettings,
        {
            "losses": {"gan_generator_weight": 3e-3, "gan_discriminator_weight": 1e-2},
            "optimizer": {"generator_lr": 1e-5, "fake_score_lr": 1e-5},
            "training": {"batch_size": batch_size, "generator_every": EVERY},
            "compute": {"compile": compile_networks},
        },
        "bench",
    )


def build(teacher: Model, batch_size: int, precision: str, compile_networks: bool = False) -> Distillation:
    """A fresh distillation whose fake score and generator differ from the teacher, as in the middle of a run."""
    own = build_model(copy.deepcopy(teacher.denoiser), teacher.card)
    own.denoiser.compute_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    run = build_distillation(settings(batch_size, compile_networks), own, own.conditioner.every)
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
    ours = build(teacher, batch_size, "bf16")
    variants: dict[str, Callable[[int, RealBatch, Draws], object]] = {
        "plain fp32": PlainStep(build(teacher, batch_size, "fp32"), bf16=False).step,
        "plain bf16 autocast": PlainStep(build(teacher, batch_size, "fp32"), bf16=True).step,
        "fewstep bf16": lambda step, real, draws: two_time_scale_step(ours, step, real, draws),
    }
    if compile_networks:
        compiled = build(teacher, batch_size, "bf16", compile_networks=True)
        variants["fewstep bf16 compiled"] = lambda step, real, draws: two_time_scale_step(compiled, step, real, draws)
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for cycle in range(cycles + 1):  # the first cycle warms up
        for variant, step_function in variants.items():
            started = time.perf_counter()
            for step in range(cycle * EVERY, (cycle + 1) * EVERY):
                draws = Draws.of_batch(0, step, batch_size, teacher.device)
                step_function(step, real_batch(teacher, batch_size, step), draws)
            synchronise(teacher.device)
            if cycle:
                seconds[variant].append(time.perf_counter() - started)
    medians = {variant: statistics.median(values) for variant, values in seconds.items()}
    print(f"\n{name}: batch {batch_size}, median of {cycles} cycles of {EVERY} steps")
    print("| variant | images/s | x plain fp32 | x plain bf16 |\n| --- | --- | --- | --- |")
    for variant, median in medians.items():
        rate = batch_size * EVERY / median
        print(
            f"| {variant} | {rate:.1f} | {medians['plain fp32'] / median:.2f} | {medians['plain bf16 autocast'] / median:.2f} |",
            flush=True,
        )


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
    plain = PlainStep(run, bf16=False)
    draws, real = Draws.of_batch(0, 0, batch_size, teacher.device), real_batch(teacher, batch_size, 0)
    x, labels = plain.generate(draws)
    plain.generator_loss(x, labels, draws).backward()
    generator = _flat(list(plain.generator.parameters()))
    plain.fake_optimizer.zero_grad()
    plain.fake_loss(x.detach(), labels, real, draws).backward()
    return {"generator": generator, "fake score": _flat([*plain.fake.parameters(), *plain.head.parameters()])}


def _gradients_ours(teacher: Model, batch_size: int, precision: str) -> dict[str, Tensor]:
    """Through the library's own step, with optimisers that keep the gradient instead of applying it."""
    run = build(teacher, batch_size, precision)
    kept: dict[str, Tensor] = {}
    for role, optimizer in (
        ("generator", run.generator_update.optimizer),
        ("fake score", run.fake_score_update.optimizer),
    ):
        parameters = optimizer.param_groups[0]["params"]
        optimizer.step = lambda role=role, parameters=parameters: kept.__setitem__(role, _flat(parameters))
    run.max_grad_norm = float("inf")
    two_time_scale_step(run, 0, real_batch(teacher, batch_size, 0), Draws.of_batch(0, 0, batch_size, teacher.device))
    return kept


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
