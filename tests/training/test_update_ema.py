"""Learning rates, AdamW, clipping and the weight average against their closed forms."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.settings import OptimizerSettings
from fewstep.training.build import open_teacher
from fewstep.training.distill import DistillationJob
from fewstep.training.ema import WeightAverage
from fewstep.training.pretrain import Pretraining
from fewstep.training.update import Update, build_adamw, learning_rate_factor
from tests.training.helpers import tiny_pretrain_settings, tiny_train_settings

# --- Learning rate


def test_warm_up_is_linear_and_starts_above_zero() -> None:
    settings = OptimizerSettings(warmup_steps=4)
    factors = [learning_rate_factor(settings, step, progress=0.0) for step in range(7)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_without_warm_up_the_first_step_has_the_whole_rate() -> None:
    assert learning_rate_factor(OptimizerSettings(warmup_steps=0), 0, progress=0.0) == 1.0


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0, 1.7])
def test_constant_rate_ignores_progress(progress: float) -> None:
    settings = OptimizerSettings(warmup_steps=0, final_lr_fraction=1.0)
    assert learning_rate_factor(settings, 100, progress) == 1.0


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 1.0), (1 / 3, 0.75), (0.5, 0.5), (2 / 3, 0.25), (1.0, 0.0), (1.5, 0.0)],
)
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_rate(progress: float, expected: float, final: float) -> None:
    """Half a cosine from 1 to the final fraction; a run past its end stays there."""
    settings = OptimizerSettings(warmup_steps=0, final_lr_fraction=final)
    assert learning_rate_factor(settings, 100, progress) == pytest.approx(final + (1 - final) * expected, abs=1e-12)


def test_warm_up_multiplies_the_cosine() -> None:
    settings = OptimizerSettings(warmup_steps=10, final_lr_fraction=0.0)
    expected = 0.3 * (1 + math.cos(math.pi * 0.2)) / 2
    assert learning_rate_factor(settings, 2, progress=0.2) == pytest.approx(expected)


def test_a_rate_reaches_every_group() -> None:
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))]}], lr=1.0
    )
    Update({}, 0.5, optimizer, 10.0).set_rate(0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.slow
def test_a_job_sets_both_rates_from_the_step(teacher_folder: Path, pictures: Path, tmp_path: Path) -> None:
    settings = tiny_train_settings(
        teacher_folder, pictures, tmp_path, training={"batch_size": 2},
        optimizer={"generator_lr": 1e-3, "fake_score_lr": 4e-3, "warmup_steps": 4, "decay": "cosine"},
    )  # fmt: skip
    job = DistillationJob(settings, open_teacher(settings))
    for step, progress in ((0, 0.0), (1, 0.5), (5, 0.75)):
        job.step(step, progress)
        factor = min(1, (step + 1) / 4) * (1 + math.cos(math.pi * progress)) / 2
        assert job.run.generator_update.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * factor)
        assert job.run.fake_score_update.optimizer.param_groups[0]["lr"] == pytest.approx(4e-3 * factor)


def test_pretraining_sets_its_rate_before_the_update(pictures: Path, tmp_path: Path) -> None:
    """The first update already has the warm-up's rate: AdamW's first step moves each weight by about the rate."""
    settings = tiny_pretrain_settings(pictures, tmp_path, optimizer={"generator_lr": 1e-3, "warmup_steps": 10})
    job = Pretraining(settings)
    before = [parameter.detach().clone() for parameter in job.denoiser.parameters()]
    job.step(0, 0.0)
    moved = max(float((p - b).detach().abs().max()) for p, b in zip(job.denoiser.parameters(), before, strict=True))
    assert moved == pytest.approx(1e-4, rel=1e-2)


# --- AdamW and clipping


def test_adamw_settings() -> None:
    settings = OptimizerSettings(betas=(0.8, 0.95), weight_decay=0.3)
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    optimizer = build_adamw(iter(parameters), 5e-4, settings)
    (group,) = optimizer.param_groups
    assert (group["betas"], group["weight_decay"], group["lr"], group["fused"]) == ((0.8, 0.95), 0.3, 5e-4, True)
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in parameters]
    assert not group["amsgrad"]


def test_published_settings_are_the_defaults() -> None:
    settings = OptimizerSettings()
    assert (settings.betas, settings.weight_decay, settings.max_grad_norm) == ((0.9, 0.999), 0.01, 10.0)
    assert (settings.warmup_steps, settings.decay) == (500, "constant")


def test_adamw_updates_against_the_definition() -> None:
    """Three steps in float64: decoupled weight decay, both moments bias-corrected."""
    beta1, beta2, lr, decay = 0.7, 0.9, 0.05, 0.2
    start, gradients = torch.tensor([1.0, -2.0, 0.5]), torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(start.clone())
    optimizer = build_adamw([weight], lr, OptimizerSettings(betas=(beta1, beta2), weight_decay=decay))
    expected, first, second = start.double(), torch.zeros(3).double(), torch.zeros(3).double()
    for number, gradient in enumerate(gradients, start=1):
        weight.grad = gradient.clone()
        Update({"weight": weight}, lr, optimizer, max_grad_norm=1e9).step()
        first = beta1 * first + (1 - beta1) * gradient.double()
        second = beta2 * second + (1 - beta2) * gradient.double() ** 2
        step = (first / (1 - beta1**number)) / ((second / (1 - beta2**number)).sqrt() + 1e-8)
        expected = expected * (1 - lr * decay) - lr * step
    assert torch.allclose(weight.detach().double(), expected, rtol=1e-6)


@pytest.mark.parametrize("max_norm", [1.0, 13.0, 100.0])
def test_an_update_is_clipped(max_norm: float) -> None:
    """One norm over all parameters; the returned one is that before clipping."""
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    norm = Update({"a": a, "b": b}, 1.0, torch.optim.SGD([a, b], lr=1.0), max_norm).step()["grad_norm"]
    assert float(norm) == 13.0
    assert not norm.requires_grad
    scale = min(1.0, max_norm / 13)
    assert torch.cat([a, b]).tolist() == pytest.approx([-3 * scale, -4 * scale, -12 * scale], rel=1e-5)
    assert a.grad is None
    assert b.grad is None


def test_an_update_lets_non_finite_norms_be_seen() -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([math.inf, 1.0])
    metrics = Update({"weight": weight}, 1.0, torch.optim.SGD([weight], lr=1.0), 10.0, prefix="generator_").step()
    assert list(metrics) == ["generator_grad_norm"]
    assert math.isinf(float(metrics["generator_grad_norm"]))


# --- Weight average


class Weighted(nn.Module):
    """One parameter and one buffer."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), value))
        self.register_buffer("counter", torch.full((2,), value))


@pytest.mark.parametrize("batch", [1, 10, 250])
def test_half_life(batch: int) -> None:
    """After half_life images the distance to a constant target has halved, whatever the batch."""
    average = WeightAverage(Weighted(0.0), half_life_images=1000)
    target = Weighted(1.0)
    for number in range(1000 // batch):
        average.update(target, 10**9 + number * batch, batch)
    assert average.module.weight.tolist() == pytest.approx([0.5] * 3, abs=1e-5)


def test_ramp_up() -> None:
    """Early on the half-life is 5% of the images seen, so that the random start is forgotten."""
    average = WeightAverage(Weighted(0.0), half_life_images=1000)
    assert average.decay(images_seen=200, batch_size=10) == pytest.approx(0.5)  # half-life 10
    assert average.decay(images_seen=400, batch_size=10) == pytest.approx(0.5**0.5)  # half-life 20
    assert average.decay(images_seen=20_000, batch_size=10) == pytest.approx(0.5 ** (10 / 1000))
    assert average.decay(images_seen=10**9, batch_size=10) == pytest.approx(0.5 ** (10 / 1000))
    other = WeightAverage(Weighted(0.0), half_life_images=1000, ramp_up=0.5)
    assert other.decay(images_seen=200, batch_size=10) == pytest.approx(0.5 ** (10 / 100))


def test_first_update_takes_the_weights_over() -> None:
    average = WeightAverage(Weighted(0.0), half_life_images=1e6)
    average.update(Weighted(0.7), images_seen=0, batch_size=4)
    assert torch.equal(average.module.weight, Weighted(0.7).weight)


def test_buffers_are_copied() -> None:
    average = WeightAverage(Weighted(0.0), half_life_images=1e6)
    average.update(Weighted(2.0), images_seen=10**9, batch_size=1)
    assert average.module.counter.tolist() == [2.0, 2.0]
    assert average.module.weight.max() < 1e-3


def test_the_average_is_frozen() -> None:
    average = WeightAverage(Weighted(1.0).train(), half_life_images=1000)
    assert not average.module.training
    assert not average.module.weight.requires_grad


@pytest.mark.slow
def test_average_of_a_job_counts_the_images_of_all_steps(teacher_folder: Path, pictures: Path, tmp_path: Path) -> None:
    """The generator moves every third step; its average still has a half-life in images of the whole run."""
    half_life, batch, every = 200.0, 4, 3
    settings = tiny_train_settings(
        teacher_folder, pictures, tmp_path, generator={"ema_half_life_images": half_life},
        training={"batch_size": batch, "generator_every": every},
    )  # fmt: skip
    job = DistillationJob(settings, open_teacher(settings))
    assert job.average is not None
    expected = flat(job.run.roles.generator)
    for step in (0, 1, 2, 3000, 3001, 3002, 3003):  # far enough for the ramp-up to be over
        job.step(step, 0.0)
        if step % every == 0:
            share = 1.0 if step == 0 else 1 - 0.5 ** (batch * every / half_life)
            expected = expected + share * (flat(job.run.roles.generator) - expected)
        assert torch.allclose(flat(job.average.module), expected, atol=1e-6)
    assert not torch.allclose(flat(job.average.module), flat(job.run.roles.generator), atol=1e-6)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in module.parameters()])
