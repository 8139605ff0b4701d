import math
import re

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.per_sample import per_sample
from fewstep.losses import (
    denoising_loss,
    discriminator_adversarial_loss,
    distribution_matching_gradient,
    distribution_matching_loss,
    generator_adversarial_loss,
    regression_loss,
)
from tests.conftest import tiny_denoiser

SHAPE = (3, 2, 4, 5)


def images(count: int, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_distribution_matching_gradient_sample_by_sample() -> None:
    x0, real, fake = images(3)
    gradient = distribution_matching_gradient(x0, real, fake)
    for i in range(len(x0)):
        scale = sum(abs(a - b) for a, b in zip(x0[i].flatten().tolist(), real[i].flatten().tolist(), strict=True)) / 40
        torch.testing.assert_close(gradient[i], (fake[i] - real[i]) / scale)


def test_distribution_matching_gradient_attaches_no_graph() -> None:
    inputs = [image.requires_grad_(True) for image in images(3)]
    assert not distribution_matching_gradient(*inputs).requires_grad


def test_distribution_matching_gradient_is_zero_where_the_teacher_agrees_with_the_generator() -> None:
    x0, real, fake = (image.float() for image in images(3))
    real[1] = x0[1]
    gradient = distribution_matching_gradient(x0, real, fake)
    assert not gradient[1].any()  # 0/0, and the paper's division by zero where only the fake score differs
    assert gradient[[0, 2]].abs().min() > 0
    assert not distribution_matching_gradient(x0, x0, x0).any()


@pytest.mark.parametrize("distance", [1e-42, 1e-38, 1e-20])
def test_distribution_matching_gradient_stays_finite_next_to_zero(distance: float) -> None:
    real = torch.zeros(1, 1, 2, 2)
    gradient = distribution_matching_gradient(real + distance, real, real + 1)
    assert gradient.isfinite().all()
    assert gradient.min() > 1e19


def test_distribution_matching_gradient_is_normalised() -> None:
    x0, real, fake = images(3)
    gradient = distribution_matching_gradient(x0, real, fake)
    torch.testing.assert_close(distribution_matching_gradient(7 * x0, 7 * real, 7 * fake), gradient)
    # where the fake score sees the image itself, the direction has mean length one
    lengths = distribution_matching_gradient(x0, real, x0).abs().mean(dim=(1, 2, 3))
    torch.testing.assert_close(lengths, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("teacher_sees", ["above", "below"])
def test_a_descent_step_moves_the_image_toward_the_teacher(teacher_sees: str) -> None:
    sign = 1 if teacher_sees == "above" else -1
    x0 = torch.zeros(SHAPE, requires_grad=True)
    gradient = distribution_matching_gradient(x0, torch.full(SHAPE, sign * 0.5), torch.full(SHAPE, sign * 0.2))
    distribution_matching_loss(x0, gradient).backward()
    moved = x0 - 10 * x0.grad
    assert (sign * moved > 0).all()


def test_distribution_matching_loss_value_and_gradient() -> None:
    x0, direction = images(2)
    x0.requires_grad_(True)
    loss = distribution_matching_loss(x0, direction)
    assert loss.item() == pytest.approx(0.5 * direction.square().mean().item(), rel=1e-12)
    loss.backward()
    torch.testing.assert_close(x0.grad, direction / direction.numel())
    assert x0.numel() == math.prod(SHAPE)


def test_distribution_matching_loss_sends_gradient_to_the_image_only() -> None:
    x0, direction = (image.requires_grad_(True) for image in images(2))
    distribution_matching_loss(x0, direction).backward()
    assert direction.grad is None


def test_a_teacher_that_diverges_is_not_hidden() -> None:
    x0, real, fake = (image.float() for image in images(3))
    real[0, 0, 0, 0] = math.nan
    assert not distribution_matching_gradient(x0, real, fake)[0].isfinite().all()


def test_a_fake_score_that_diverges_is_not_hidden() -> None:
    x0, real, fake = (image.float() for image in images(3))
    fake[0, 0, 0, 0] = math.nan
    gradient = distribution_matching_gradient(x0, real, fake)
    assert gradient[0].isnan().any()
    assert gradient[1:].isfinite().all()


def test_denoising_loss_weights_every_sample() -> None:
    estimate, x0 = images(2)
    weight, error = torch.tensor([0.5, 2.0, 4e5], dtype=torch.float64), estimate - x0
    estimate.requires_grad_(True)
    loss = denoising_loss(estimate, x0, weight)
    expected = sum(float(weight[i] * error[i].square().sum()) for i in range(3)) / x0.numel()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    for i in range(3):
        torch.testing.assert_close(estimate.grad[i], 2 * weight[i] * error[i] / x0.numel())
    assert denoising_loss(x0, x0, weight).item() == 0


def test_denoising_loss_is_edms_loss_of_the_raw_network() -> None:
    """Mean over all elements of (F - (x0 - c_skip noisy) / c_out)^2: EDM trains F toward a unit-variance target."""
    denoiser = tiny_denoiser(num_classes=0).double()
    x0, noise = images(2, (4, 1, 16, 16))
    sigma = torch.tensor([0.01, 0.5, 4, 80], dtype=torch.float64)[:, None, None, None]
    noisy, variance = x0 + sigma * noise, sigma**2 + 0.5**2
    c_skip, c_out = 0.25 / variance, sigma * 0.5 / variance.sqrt()
    raw, _ = denoiser.model(noisy / variance.sqrt(), sigma.flatten().log() / 4, None, "output")
    expected = (raw - (x0 - c_skip * noisy) / c_out).square().mean()
    level = sigma.flatten()
    estimate = denoiser(noisy, level, Condition(4), "x0").x0
    loss = denoising_loss(estimate, x0, denoiser.denoising_weight(level))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


LOGITS = [-30.0, -2.0, 0.0, 0.5, 30.0]


def test_generator_adversarial_loss_value_and_gradient() -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    loss = generator_adversarial_loss(logits)
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-x)) for x in LOGITS) / 5, rel=1e-10)
    loss.backward()
    assert logits.grad.tolist() == pytest.approx([-1 / (1 + math.exp(x)) / 5 for x in LOGITS], rel=1e-10)


def test_discriminator_adversarial_loss_value_and_gradient() -> None:
    real = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    generated = torch.tensor([1.0, -3.0], dtype=torch.float64, requires_grad=True)
    loss = discriminator_adversarial_loss(real, generated)
    expected = sum(math.log1p(math.exp(-x)) for x in LOGITS) / 5
    expected += (math.log1p(math.exp(1)) + math.log1p(math.exp(-3))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    loss.backward()
    assert real.grad.tolist() == pytest.approx([-1 / (1 + math.exp(x)) / 5 for x in LOGITS], rel=1e-10)
    assert generated.grad.tolist() == pytest.approx([1 / (1 + math.exp(-x)) / 2 for x in (1, -3)], rel=1e-10)


def test_adversaries_pull_the_generated_logit_in_opposite_directions() -> None:
    real, generated = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    discriminator_adversarial_loss(real, generated).backward()
    assert (real.grad < 0).all()  # a descent step raises the logit of real images
    assert (generated.grad > 0).all()  # and lowers that of generated ones
    generated.grad = None
    generator_adversarial_loss(generated).backward()
    assert (generated.grad < 0).all()
    assert discriminator_adversarial_loss(real, generated).item() == pytest.approx(2 * math.log(2))


def test_adversarial_losses_do_not_saturate() -> None:
    """At a confident discriminator the generator keeps its full gradient, and nothing overflows."""
    lost = torch.tensor([-1000.0], requires_grad=True)
    loss = generator_adversarial_loss(lost)
    loss.backward()
    assert loss.item() == pytest.approx(1000)
    assert lost.grad.item() == pytest.approx(-1)
    assert discriminator_adversarial_loss(torch.tensor([1000.0]), lost.detach()).item() == 0


def test_regression_loss_is_the_mean_of_the_given_distance() -> None:
    x0, target = images(2)
    error = x0 - target
    x0.requires_grad_(True)
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    calls = []

    def distance(a: Tensor, b: Tensor) -> Tensor:
        calls.append((a, b))
        return scale * (a - b).square().sum(dim=(1, 2, 3))

    loss = regression_loss(x0, target, distance)
    assert len(calls) == 1
    assert calls[0][0] is x0
    assert calls[0][1] is target
    expected = sum(float(scale[i] * error[i].square().sum()) for i in range(3)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    torch.testing.assert_close(x0.grad, 2 * scale[:, None, None, None] * error / 3)


A, B = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: distribution_matching_gradient(A, B, A),
            "x0 (2, 1, 4, 4), real_x0 (2, 1, 4, 5), fake_x0 (2, 1, 4, 4)",
        ),
        (lambda: distribution_matching_gradient(A, A, B), "fake_x0 (2, 1, 4, 5)"),
        (lambda: distribution_matching_gradient(A, A[:1], A), "real_x0 (1, 1, 4, 4)"),
        (lambda: distribution_matching_loss(A, B), "x0 (2, 1, 4, 4), gradient (2, 1, 4, 5)"),
        (lambda: denoising_loss(A, B, torch.ones(2)), "estimate (2, 1, 4, 4), x0 (2, 1, 4, 5)"),
        (lambda: regression_loss(A, B, lambda a, b: a), "x0 (2, 1, 4, 4), target (2, 1, 4, 5)"),
    ],
)
def test_different_shapes_are_refused_by_name(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"^shapes differ: .*" + re.escape(message)):
        call()


@pytest.mark.parametrize("shape", [(5,), (4, 3), (4, 3, 2), (4, 3, 2, 3)], ids=["2 axes", "3 axes", "4 axes", "5 axes"])
def test_any_number_of_axes(shape: tuple[int, ...]) -> None:
    """Each sample of a batch is weighed alone: samples whose scales differ, one by one and together."""
    torch.manual_seed(0)
    scales = torch.tensor([0.01, 1.0, 300.0])
    x0, real, fake = (per_sample(scales, part) * part for part in torch.randn(3, 3, *shape).unbind(0))
    gradient, weight = distribution_matching_gradient(x0, real, fake), torch.tensor([3.0, 0.1, 7.0])
    alone = [distribution_matching_gradient(x0[i : i + 1], real[i : i + 1], fake[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(gradient, torch.cat(alone))
    torch.testing.assert_close(gradient[0], (fake[0] - real[0]) / (x0[0] - real[0]).abs().mean())
    parts = [denoising_loss(fake[i : i + 1], x0[i : i + 1], weight[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(denoising_loss(fake, x0, weight), torch.stack(parts).mean())
