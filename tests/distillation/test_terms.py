import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser, DenoiserOutput, Want
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.schedules import KarrasSchedule
from fewstep.distillation.inputs import GeneratorInput, RealBatch
from fewstep.distillation.terms import (
    DiscriminatorAdversarial,
    DistributionMatching,
    FakeScoreDenoising,
    GeneratorAdversarial,
    Regression,
    TermResult,
    pad_rows,
    shifted_index,
)
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.networks.discriminator import Discriminator
from fewstep.training.step import MicroBatch, Tally, combined_gradient, fake_score_loss, micro_batches
from tests.conftest import relative_error, tiny_denoiser

FRESH, PAIRED = 3, 2
SHAPE = (1, 16, 16)
INDEX = torch.tensor([20, 500, 980])


@pytest.fixture
def teacher() -> EDMDenoiser:
    return tiny_denoiser(seed=1).requires_grad_(False)


@pytest.fixture
def fake_score() -> EDMDenoiser:
    return tiny_denoiser(seed=2)


@pytest.fixture
def head() -> Discriminator:
    torch.manual_seed(3)
    return Discriminator((32, 4, 4))


@pytest.fixture
def batch() -> GeneratorInput:
    torch.manual_seed(4)
    size = FRESH + PAIRED
    condition = Condition.from_labels(torch.tensor([0, 1, 2, 3, 1]), 4)
    level, target = torch.full((size,), 80.0), torch.randn(PAIRED, *SHAPE)
    return GeneratorInput(torch.randn(size, *SHAPE), level, condition, FRESH, target)


@pytest.fixture
def x0() -> Tensor:
    return 0.5 * torch.randn(FRESH + PAIRED, *SHAPE, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(FRESH, *SHAPE, generator=torch.Generator().manual_seed(6))


def whole_batch(size: int) -> MicroBatch:
    """A step's batch in one part, without real data."""
    (part,) = micro_batches(Draws.of_batch(0, 0, size), RealBatch(torch.empty(0, *SHAPE), Condition(0)), 0)
    return part


def column(values: Tensor) -> Tensor:
    return values.double()[:, None, None, None]


def sigmas(index: Tensor) -> Tensor:
    return KarrasSchedule().grid[index].double()


def bottleneck(denoiser: EDMDenoiser, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """The feature in float64, past the contract's cast to float32."""
    scaled = noisy / (column(sigma) ** 2 + 0.25).sqrt()
    return copy.deepcopy(denoiser).double().model(scaled, sigma.log() / 4, labels.double(), "features")[1][0]


def logits(head: Discriminator, feature: Tensor) -> Tensor:
    return nn.Sequential(*copy.deepcopy(head).double()).forward(feature).flatten()


def softplus(values: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(values))


def assert_no_gradient(*modules: nn.Module) -> None:
    assert all(parameter.grad is None for module in modules for parameter in module.parameters())


def assert_only_fresh_rows(result: TermResult, x0: Tensor) -> None:
    assert result.gradient.shape == x0.shape
    assert not result.loss.requires_grad
    assert not result.gradient.requires_grad
    assert (result.gradient[:FRESH].flatten(1).norm(dim=1) > 0).all()
    assert not result.gradient[FRESH:].any()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_distribution_matching_against_float64(
    teacher: EDMDenoiser,
    fake_score: EDMDenoiser,
    batch: GeneratorInput,
    x0: Tensor,
    noise: Tensor,
    guidance_scale: float,
) -> None:
    term = DistributionMatching(teacher, fake_score, guidance_scale, 20, 980)
    result = term.at(x0, batch, INDEX, noise)

    fresh, sigma = x0[:FRESH].double().requires_grad_(True), sigmas(INDEX)
    labels = batch.condition["class_labels"][:FRESH].double()
    noisy = (fresh + column(sigma) * noise.double()).detach()
    score, real = copy.deepcopy(fake_score).double(), copy.deepcopy(teacher).double()
    with torch.no_grad():
        given = real.denoise(noisy, sigma, Condition.from_one_hot(labels))
        free = real.denoise(noisy, sigma, Condition.from_one_hot(torch.zeros_like(labels)))
        mu_real = free + guidance_scale * (given - free)
        mu_fake = score.denoise(noisy, sigma, Condition.from_one_hot(labels))
        scale = (fresh - mu_real).abs().mean(dim=(1, 2, 3), keepdim=True)
        wanted = fresh - (mu_fake - mu_real) / scale
    loss = 0.5 * (fresh - wanted).square().sum() / fresh.numel()
    loss.backward()

    assert relative_error(result.loss, loss.detach()) < 1e-4
    assert relative_error(result.gradient[:FRESH], fresh.grad) < 1e-3
    assert_only_fresh_rows(result, x0)
    assert_no_gradient(teacher, fake_score)


def test_fake_score_is_never_guided(teacher: EDMDenoiser, batch: GeneratorInput, x0: Tensor, noise: Tensor) -> None:
    """With teacher and fake score alike there is no direction, until guidance moves the teacher alone."""
    plain = DistributionMatching(teacher, copy.deepcopy(teacher), 1.0, 20, 980).at(x0, batch, INDEX, noise)
    assert not plain.gradient.any()
    assert plain.loss == 0
    guided = DistributionMatching(teacher, copy.deepcopy(teacher), 3.0, 20, 980).at(x0, batch, INDEX, noise)
    assert guided.gradient[:FRESH].any()


def test_generator_adversarial_against_float64(
    fake_score: EDMDenoiser, head: Discriminator, batch: GeneratorInput, x0: Tensor, noise: Tensor
) -> None:
    result = GeneratorAdversarial(fake_score, head, 1.0).at(x0, batch, INDEX, noise)

    fresh, sigma = x0[:FRESH].double().requires_grad_(True), sigmas(INDEX)
    feature = bottleneck(fake_score, fresh + column(sigma) * noise, sigma, batch.condition["class_labels"][:FRESH])
    loss = softplus(-logits(head, feature)).sum() / FRESH
    loss.backward()

    assert relative_error(result.loss, loss.detach()) < 1e-5
    assert relative_error(result.gradient[:FRESH], fresh.grad) < 1e-4
    assert_only_fresh_rows(result, x0)
    assert_no_gradient(fake_score, head)


def weighted_distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).pow(4).mean(dim=(1, 2, 3)) * torch.arange(1, len(a) + 1)


def test_regression_against_float64(batch: GeneratorInput, x0: Tensor) -> None:
    result = Regression(weighted_distance, 0.25)(x0, batch, Draws.of_batch(0, 0, FRESH))
    difference = x0[FRESH:].double() - batch.target.double()
    rows = torch.tensor([1.0, 2.0])
    loss = (difference.pow(4).mean(dim=(1, 2, 3)) * rows).mean()
    assert relative_error(result.loss, loss) < 1e-6
    expected = 4 * difference.pow(3) * column(rows) / difference[0].numel() / PAIRED
    assert relative_error(result.gradient[FRESH:], expected) < 1e-5
    assert result.gradient.shape == x0.shape
    assert not result.gradient[:FRESH].any()
    assert not result.loss.requires_grad
    assert not x0.requires_grad


def test_no_term_needs_or_touches_the_graph_of_the_generator(
    teacher: EDMDenoiser, fake_score: EDMDenoiser, head: Discriminator, batch: GeneratorInput, x0: Tensor, noise: Tensor
) -> None:
    """The step hands over a detached x0; a term given an attached one must still leave the generator alone."""
    start = x0.clone().requires_grad_(True)
    attached = start * 1.0
    DistributionMatching(teacher, fake_score, 1.0, 20, 980).at(attached, batch, INDEX, noise)
    GeneratorAdversarial(fake_score, head, 1.0).at(attached, batch, INDEX, noise)
    Regression(weighted_distance, 1.0)(attached, batch, Draws.of_batch(0, 0, FRESH))
    assert start.grad is None
    assert_no_gradient(teacher, fake_score, head)


def test_earlier_gradients_of_the_scores_survive_a_generator_term(
    fake_score: EDMDenoiser, head: Discriminator, batch: GeneratorInput, x0: Tensor, noise: Tensor
) -> None:
    for parameter in [*fake_score.parameters(), *head.parameters()]:
        parameter.grad = torch.full_like(parameter, 7)
    GeneratorAdversarial(fake_score, head, 1.0).at(x0, batch, INDEX, noise)
    assert all((p.grad == 7).all() for p in [*fake_score.parameters(), *head.parameters()])


def test_fake_score_denoising_against_float64(fake_score: EDMDenoiser, batch: GeneratorInput, x0: Tensor) -> None:
    index = torch.tensor([0, 250, 500, 750, 999])
    torch.manual_seed(0)
    noise = torch.randn_like(x0)
    loss = FakeScoreDenoising(fake_score).at(x0, batch.condition, index, noise)
    loss.backward()

    exact, sigma = copy.deepcopy(fake_score).double(), sigmas(index)
    exact.zero_grad()
    labels = batch.condition["class_labels"].double()
    estimate = exact.denoise(x0.double() + column(sigma) * noise, sigma, Condition.from_one_hot(labels))
    expected = ((column(sigma) ** -2 + 4) * (estimate - x0).square()).sum() / x0.numel()
    expected.backward()

    assert relative_error(loss.detach(), expected.detach()) < 1e-4
    for ours, theirs in zip(fake_score.parameters(), exact.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 2e-3


class CallRecorder:
    """Counts the forwards of a network and the rows of each."""

    def __init__(self, network: nn.Module) -> None:
        self.rows: list[int] = []
        network.register_forward_pre_hook(lambda module, arguments: self.rows.append(len(arguments[0])))


def disc_inputs() -> tuple[RealBatch, Tensor, Tensor, Tensor, Tensor, Tensor, Condition]:
    torch.manual_seed(8)
    real = RealBatch(torch.randn(3, *SHAPE), Condition.from_labels(torch.tensor([3, 3, 0]), 4))
    generated, condition = torch.randn(2, *SHAPE), Condition.from_labels(torch.tensor([1, 2]), 4)
    real_index, generated_index = torch.tensor([10, 500, 999]), torch.tensor([0, 700])
    return real, generated, real_index, torch.randn(3, *SHAPE), generated_index, torch.randn(2, *SHAPE), condition


def test_discriminator_adversarial_against_two_forwards_in_float64(
    fake_score: EDMDenoiser, head: Discriminator
) -> None:
    real, generated, real_index, real_noise, index, noise, condition = disc_inputs()
    calls = CallRecorder(fake_score)
    term = DiscriminatorAdversarial(fake_score, head, 0.01)
    loss = term.at(generated, condition, real, real_index, real_noise, index, noise)
    assert calls.rows == [5]
    loss.backward()

    exact_score, exact_head = copy.deepcopy(fake_score).double(), copy.deepcopy(head).double()
    exact_score.zero_grad()
    exact_head.zero_grad()

    def separate(images: Tensor, noise: Tensor, index: Tensor, labels: Tensor) -> Tensor:
        sigma = sigmas(index)
        scaled = (images + column(sigma) * noise) / (column(sigma) ** 2 + 0.25).sqrt()
        feature = exact_score.model(scaled, sigma.log() / 4, labels.double(), "features")[1][0]
        return nn.Sequential.forward(exact_head, feature).flatten()

    on_real = separate(real.images, real_noise, real_index, real.condition["class_labels"])
    on_generated = separate(generated, noise, index, condition["class_labels"])
    expected = softplus(on_generated).mean() + softplus(-on_real).mean()
    expected.backward()
    assert relative_error(loss.detach(), expected.detach()) < 1e-5
    pairs = [*zip(fake_score.named_parameters(), exact_score.parameters(), strict=True)]
    for (name, ours), theirs in [*pairs, *zip(head.named_parameters(), exact_head.parameters(), strict=True)]:
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            assert relative_error(ours.grad, theirs.grad) < 1e-3, name
    assert fake_score.model.enc["8x8_conv"].weight.grad.any()  # the encoder is trained through the head


def test_discriminator_learns_with_each_image_under_its_own_condition(
    fake_score: EDMDenoiser, head: Discriminator
) -> None:
    real, generated, *draws, condition = disc_inputs()
    term = DiscriminatorAdversarial(fake_score, head, 0.01)
    loss = term.at(generated, condition, real, *draws).item()
    other = RealBatch(real.images, Condition.from_labels(torch.tensor([0, 1, 2]), 4))
    assert term.at(generated, condition, other, *draws).item() != pytest.approx(loss, rel=1e-6)
    swapped = Condition.from_labels(torch.tensor([2, 1]), 4)
    assert term.at(generated, swapped, real, *draws).item() != pytest.approx(loss, rel=1e-6)


class PointDenoiser(Denoiser):
    """A one-pixel model, so that many draws are cheap."""

    def __init__(self) -> None:
        super().__init__()
        self.noise_schedule = KarrasSchedule()
        self.image_shape = (1, 1, 1)

    def forward(self, noisy: Tensor, level: Tensor, condition: Condition, want: Want = "x0") -> DenoiserOutput:
        return DenoiserOutput(noisy, noisy)


def recorded(term: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(term, "at", lambda *arguments: calls.append(arguments))
    return calls


def call_generator_term(term: Any, draws: Draws) -> None:
    term(torch.zeros(len(draws.positions), 1, 1, 1), None, draws)


def call_fake_score_term(term: Any, draws: Draws) -> None:
    term(torch.zeros(len(draws.positions), 1, 1, 1), None, None, draws)


MANY = 40_000


@pytest.mark.parametrize(
    ("build", "call", "purposes", "low", "high"),
    [
        (lambda m: DistributionMatching(m, m, 1.0, 20, 980), call_generator_term, [("dm_level", "dm_noise")], 20, 980),
        (lambda m: DistributionMatching(m, m, 1.0, 7, 9), call_generator_term, [("dm_level", "dm_noise")], 7, 9),
        (lambda m: GeneratorAdversarial(m, m, 1.0), call_generator_term, [("gan_level", "gan_noise")], 0, 999),
        (FakeScoreDenoising, call_fake_score_term, [("fake_level", "fake_noise")], 0, 999),
        (
            lambda m: DiscriminatorAdversarial(m, m, 1.0), call_fake_score_term,
            [("disc_level_real", "disc_noise_real"), ("disc_level_generated", "disc_noise_generated")], 0, 999,
        ),
    ],
    ids=["dm", "dm-narrow", "gan", "fake", "disc"],
)  # fmt: skip
def test_levels_are_uniform_over_the_published_range_and_belong_to_the_sample(
    build: Callable[[Any], Any], call: Callable[[Any, Draws], None], purposes: list[tuple[Any, Any]],
    low: int, high: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    term = build(PointDenoiser())
    calls = recorded(term, monkeypatch)
    draws = Draws.of_batch(11, 5, MANY)
    call(term, draws)
    ((*_, last),) = calls
    drawn = calls[0][-2 * len(purposes) :]
    assert last is drawn[-1]
    for (level, noise), (index, sample) in zip(purposes, zip(drawn[::2], drawn[1::2], strict=True), strict=True):
        assert (int(index.min()), int(index.max())) == (low, high)
        assert len(index.unique()) == high - low + 1
        assert torch.equal(index, draws.integers(level, low, high + 1))
        assert torch.equal(sample, draws.normal(noise, (1, 1, 1)))


@pytest.mark.parametrize("shift", [0.25, 3.0])
def test_shifted_levels_have_the_density_of_the_shift(shift: float) -> None:
    """The share of levels below any index is that of f / (s + (1 - s) f), the shift's inverse; the draws are the uniform ones."""
    index = Draws.of_batch(11, 5, MANY).integers("dm_level", 20, 981)
    moved = shifted_index(index, 20, 980, shift)
    assert 20 <= int(moved.min()) <= int(moved.max()) <= 980
    for limit in (100, 300, 500, 700, 900):
        f = (limit - 20) / 961
        share = float((moved < limit).double().mean())
        assert share == pytest.approx(f / (shift + (1 - shift) * f), abs=0.01)
    assert torch.equal(shifted_index(index, 20, 980, 1.0), index)


def test_a_term_draws_shifted_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = PointDenoiser()
    term = DistributionMatching(model, model, 1.0, 20, 980, level_shift=3.0)
    calls = recorded(term, monkeypatch)
    draws = Draws.of_batch(11, 5, 100)
    call_generator_term(term, draws)
    index = calls[0][-2]
    assert torch.equal(index, shifted_index(draws.integers("dm_level", 20, 981), 20, 980, 3.0))
    assert float(index.double().mean()) > 600


def test_terms_of_one_step_draw_independently() -> None:
    draws = Draws.of_batch(0, 0, 1000)
    levels = ["dm_level", "gan_level", "fake_level", "disc_level_real", "disc_level_generated"]
    values = torch.stack([draws.integers(purpose, 0, 1000).double() for purpose in levels])  # type: ignore[arg-type]
    assert (torch.corrcoef(values) - torch.eye(5)).abs().max() < 0.16


def test_calling_a_term_is_computing_it_at_its_draws(
    teacher: EDMDenoiser, fake_score: EDMDenoiser, head: Discriminator, batch: GeneratorInput, x0: Tensor
) -> None:
    draws = Draws.of_batch(3, 4, FRESH)
    matching = DistributionMatching(teacher, fake_score, 1.0, 20, 980)
    index, noise = draws.integers("dm_level", 20, 981), draws.normal("dm_noise", SHAPE)
    assert torch.equal(matching(x0, batch, draws).gradient, matching.at(x0, batch, index, noise).gradient)
    fooling = GeneratorAdversarial(fake_score, head, 1.0)
    index, noise = draws.integers("gan_level", 0, 1000), draws.normal("gan_noise", SHAPE)
    assert torch.equal(fooling(x0, batch, draws).gradient, fooling.at(x0, batch, index, noise).gradient)
    assert torch.equal(fooling(x0, batch, draws).gradient, fooling(x0, batch, draws).gradient)


@pytest.mark.parametrize("rows", [3, 5])
def test_pad_rows_appends_zeros(rows: int) -> None:
    gradient = torch.randn(3, 1, 2, 2)
    padded = pad_rows(gradient, rows)
    assert padded.shape == (rows, 1, 2, 2)
    assert torch.equal(padded[:3], gradient)
    assert not padded[3:].any()


class ConstantTerm:
    """A term of known gradient."""

    def __init__(self, name: str, weight: float, gradient: Tensor, loss: float) -> None:
        self.name, self.weight, self.gradient, self.loss = name, weight, gradient, torch.tensor(loss)

    def __call__(self, x0: Tensor, batch: GeneratorInput, draws: Draws) -> TermResult:
        return TermResult(self.loss, self.gradient)


def test_combined_gradient_sums_the_weighted_terms(batch: GeneratorInput, x0: Tensor) -> None:
    torch.manual_seed(0)
    first, second, third = torch.randn(3, *x0.shape)
    kept = first.clone()
    terms: list[Any] = [
        ConstantTerm("a", 2.0, first, 5.0),
        ConstantTerm("b", 0.003, second, 6.0),
        ConstantTerm("c", 1.0, third, 7),
    ]
    tally = Tally()
    total = combined_gradient(terms, x0, batch, whole_batch(FRESH), tally)
    metrics = tally.metrics()
    torch.testing.assert_close(total, 2 * first + 0.003 * second + third)
    assert torch.equal(first, kept)
    assert [metrics[f"{name}_loss"].item() for name in "abc"] == [5, 6, 7]
    norms = [2 * first.norm(), 0.003 * second.norm(), third.norm()]
    for name, norm in zip("abc", norms, strict=True):
        torch.testing.assert_close(metrics[f"{name}_norm_at_x0"], norm)
    torch.testing.assert_close(metrics["b_norm_ratio"], norms[1] / norms[0])
    torch.testing.assert_close(metrics["c_norm_ratio"], norms[2] / norms[0])
    assert "a_norm_ratio" not in metrics


def test_one_backward_of_the_combined_gradient_is_the_weighted_sum_of_losses(batch: GeneratorInput) -> None:
    """x0.backward(sum of weighted gradients) trains the generator as the sum of weighted losses would."""
    generator = tiny_denoiser(seed=9).double()
    condition = Condition.from_one_hot(batch.condition["class_labels"].double())
    x0 = generator.denoise(batch.noisy.double(), batch.level.double(), condition)
    inputs = GeneratorInput(batch.noisy, batch.level, condition, FRESH, batch.target.double())
    terms: list[Any] = [Regression(weighted_distance, 0.25), Regression(lambda a, b: (a - b).abs().sum((1, 2, 3)), 3.0)]
    gradient = combined_gradient(terms, x0.detach(), inputs, whole_batch(FRESH), Tally())
    parameters = list(generator.parameters())
    ours = torch.autograd.grad(x0, parameters, gradient, retain_graph=True)
    paired, target = x0[FRESH:], inputs.target
    loss = 0.25 * weighted_distance(paired, target).mean() + 3 * (paired - target).abs().sum((1, 2, 3)).mean()
    for a, b in zip(ours, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_fake_score_loss_sums_the_weighted_terms(x0: Tensor, batch: GeneratorInput) -> None:
    value = torch.tensor(2.0, requires_grad=True)

    class Quadratic:
        def __init__(self, name: str, weight: float) -> None:
            self.name, self.weights = name, {name: weight}

        def __call__(self, *arguments: Any) -> dict[str, Tensor]:
            return {self.name: value**2}

    tally = Tally()
    terms: list[Any] = [Quadratic("fake_score", 1.0), Quadratic("gan_discriminator", 0.01)]
    total = fake_score_loss(terms, x0, batch.condition, whole_batch(5), tally)
    total.backward()
    metrics = tally.metrics()
    assert total.item() == pytest.approx(4.04)
    assert value.grad.item() == pytest.approx(4.04)
    assert {name: metric.item() for name, metric in metrics.items()} == {
        "fake_score_loss": 4, "gan_discriminator_loss": 4,
    }  # fmt: skip
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("guidance_scale", [1.0, 8.0])
def test_a_small_difference_of_two_estimates_is_not_rounded(
    teacher: EDMDenoiser, batch: GeneratorInput, x0: Tensor, noise: Tensor, guidance_scale: float
) -> None:
    """The direction is that of what the float32 networks give, computed in float64 from there on."""
    near = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.mul_(1 + 1e-5)
    result = DistributionMatching(teacher, near, guidance_scale, 20, 980).at(x0, batch, INDEX, noise)

    fresh, sigma = x0[:FRESH], KarrasSchedule().grid[INDEX]
    noisy = fresh + sigma[:, None, None, None] * noise
    scaled = noisy * (1 / (sigma**2 + 0.5**2).sqrt())[:, None, None, None]
    labels = batch.condition["class_labels"][:FRESH]

    def raw(network: EDMDenoiser, labels: Tensor) -> Tensor:
        with torch.no_grad():
            return network.model(scaled, sigma.log() / 4, labels)[0].double()

    wide = column(sigma)
    skip, out = 0.25 / (wide**2 + 0.25), wide * 0.5 / (wide**2 + 0.25).sqrt()
    real, fake = raw(teacher, labels), raw(near, labels)
    if guidance_scale != 1:
        both = torch.cat([torch.zeros_like(labels), labels])
        with torch.no_grad():
            twice = teacher.model(torch.cat([scaled] * 2), (sigma.log() / 4).repeat(2), both)[0].double()
        real = twice[:FRESH] + guidance_scale * (twice[FRESH:] - twice[:FRESH])
    distance = (fresh.double() - (skip * noisy.double() + out * real)).abs().mean((1, 2, 3), keepdim=True)
    expected = out * (fake - real) / distance / fresh.numel()
    assert relative_error(result.gradient[:FRESH], expected) < 1e-6
    assert result.gradient.dtype == torch.float32


class Seen(Exception):
    """What the discriminator's network was given."""


@pytest.mark.parametrize(("max_index", "highest"), [(999, 999), (300, 300), (0, 0), (-1, 0)])
def test_how_far_the_gan_noises_images(
    fake_score: EDMDenoiser, head: Discriminator, batch: GeneratorInput, monkeypatch: pytest.MonkeyPatch,
    max_index: int, highest: int,
) -> None:  # fmt: skip
    """The whole grid, a part of it, or clean images at its first level; of generator and discriminator alike."""
    many = 400
    condition = Condition.from_labels(torch.arange(many) % 4, 4)
    images, grid = torch.full((many, *SHAPE), 0.25), fake_score.noise_schedule.at(torch.arange(1000))
    given: list[tuple[Tensor, Tensor]] = []

    def features(noisy: Tensor, level: Tensor, _: Condition) -> tuple[Tensor, ...]:
        given.append((noisy, level))
        raise Seen

    monkeypatch.setattr(fake_score, "features", features)
    whole = GeneratorInput(images, torch.full((many,), 80.0), condition, many)
    draws = Draws.of_batch(0, 0, many)
    with pytest.raises(Seen):
        GeneratorAdversarial(fake_score, head, 1.0, max_index=max_index)(images, whole, draws)
    with pytest.raises(Seen):
        DiscriminatorAdversarial(fake_score, head, 1.0, max_index=max_index)(
            images, condition, RealBatch(images, condition), draws
        )
    for noisy, level in given:
        assert level.max() <= grid[highest]
        assert level.max() > 0.8 * grid[highest]
        assert bool((noisy == 0.25).all()) == (max_index < 0)
