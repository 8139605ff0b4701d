"""The two time-scale rule: who changes when, on which images, by which gradient, and without waiting for the device."""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.data.noise_image_pairs import NoiseImagePairs, write_shard
from fewstep.data.shard_folder import write_manifest
from fewstep.diffusion.condition import ClassTable, Condition
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.schedules import KarrasSchedule, StepSchedule
from fewstep.distillation.inputs import FreshInputs, GeneratorInput, PairedInputs, RealBatch, uniform_condition
from fewstep.distillation.roles import build_roles
from fewstep.distillation.terms import (
    DiscriminatorAdversarial,
    DistributionMatching,
    FakeScoreDenoising,
    GeneratorAdversarial,
    TermResult,
)
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.families.registry import family_named
from fewstep.models.conditioner import PromptTable
from fewstep.networks.text_encoders import TextEmbeddings
from fewstep.training.step import Distillation, two_time_scale_step
from fewstep.training.update import Update
from tests.conftest import relative_error, tiny_denoiser

BATCH, CLASSES, SHAPE, SEED = 4, 4, (1, 16, 16), 7
GAN, DISC = 3e-1, 2e-1  # large enough for a wrong factor to show
GENERATOR_METRICS = {
    "distribution_matching_loss", "distribution_matching_norm_at_x0", "gan_generator_loss",
    "gan_generator_norm_at_x0", "gan_generator_norm_ratio", "generator_grad_norm",
}  # fmt: skip
FAKE_SCORE_METRICS = {"fake_score_loss", "gan_discriminator_loss", "fake_score_grad_norm"}

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """With rate 1 the change of the parameters is the gradient that was applied."""
    return torch.optim.SGD(parameters, lr=1.0)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def update_of(
    parameters: dict[str, nn.Parameter], make_optimizer: MakeOptimizer, max_grad_norm: float, prefix: str
) -> Update:
    return Update(parameters, 1.0, make_optimizer(parameters.values()), max_grad_norm, prefix=prefix)


def build_run(
    *, generator_every: int = 1, make_optimizer: MakeOptimizer = adamw, max_grad_norm: float = 10.0,
    device: str = "cpu", step_indices: tuple[int, ...] = (999,),
) -> Distillation:  # fmt: skip
    """Four different networks and both kinds of terms."""
    roles = build_roles(tiny_denoiser(), with_discriminator=True)
    roles.generator.load_state_dict(tiny_denoiser(seed=1).state_dict())
    roles.fake_score.load_state_dict(tiny_denoiser(seed=2).state_dict())
    head = roles.discriminator
    assert head is not None
    for network in (roles.teacher, roles.generator, roles.fake_score, head):
        network.to(device)
    return Distillation(
        roles=roles,
        inputs=FreshInputs(StepSchedule(step_indices), ClassTable(roles.generator.num_classes)),
        generator_terms=[
            DistributionMatching(roles.teacher, roles.fake_score, 1.0, 20, 980),
            GeneratorAdversarial(roles.fake_score, head, GAN),
        ],
        fake_score_terms=[FakeScoreDenoising(roles.fake_score), DiscriminatorAdversarial(roles.fake_score, head, DISC)],
        generator_update=update_of(roles.generator_parameters(), make_optimizer, max_grad_norm, "generator_"),
        fake_score_update=update_of(roles.fake_score_parameters(), make_optimizer, max_grad_norm, "fake_score_"),
        generator_every=generator_every,
    )


def real_batch(device: str = "cpu") -> RealBatch:
    images = torch.rand(BATCH, *SHAPE, generator=torch.Generator().manual_seed(8)) * 2 - 1
    labels = torch.tensor([3, 0, 2, 2])
    return RealBatch(images.to(device), Condition.from_labels(labels, CLASSES).to(device))


def draws_of(step: int, device: str = "cpu") -> Draws:
    return Draws.of_batch(SEED, step, BATCH, device)


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def any_changed(before: dict[str, Tensor], module: nn.Module) -> bool:
    return any(not torch.equal(before[name], value) for name, value in module.state_dict().items())


def all_changed(before: dict[str, Tensor], module: nn.Module) -> bool:
    return all(not torch.equal(before[name], value) for name, value in module.named_parameters())


def flat_change(before: dict[str, Tensor], module: nn.Module) -> Tensor:
    """before - after of all parameters in one vector, float64."""
    parts = [before[name].double() - value.detach().double() for name, value in module.named_parameters()]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.slow
@pytest.mark.parametrize("generator_every", [1, 2, 3, 5])
def test_who_changes_when(generator_every: int) -> None:
    run = build_run(generator_every=generator_every)
    roles = run.roles
    teacher = copy_of(roles.teacher)
    turns = []
    for step in range(6):
        generator, fake_score, head = copy_of(roles.generator), copy_of(roles.fake_score), copy_of(roles.discriminator)
        metrics = two_time_scale_step(run, step, real_batch(), draws_of(step))
        changed = any_changed(generator, roles.generator)
        assert changed == all_changed(generator, roles.generator), "only a part of the generator was trained"
        assert changed == ("generator_grad_norm" in metrics)
        turns += [step] if changed else []
        assert all_changed(fake_score, roles.fake_score), f"fake score stood still at step {step}"
        assert all_changed(head, roles.discriminator), f"head stood still at step {step}"
    assert turns == [step for step in range(6) if step % generator_every == 0]
    assert not any_changed(teacher, roles.teacher)
    assert all(not p.requires_grad and p.grad is None for p in roles.teacher.parameters())


@pytest.mark.parametrize("step", [0, 1])
def test_no_gradient_is_left_behind(step: int) -> None:
    """A gradient that survived would be added to the next step's."""
    run = build_run(generator_every=2)
    two_time_scale_step(run, step, real_batch(), draws_of(step))
    roles = run.roles
    for network in (roles.teacher, roles.generator, roles.fake_score, roles.discriminator):
        assert all(parameter.grad is None for parameter in network.parameters())


class Spy:
    """A term that remembers the images it was given."""

    def __init__(self, term: Any) -> None:
        self.term, self.name, self.weight = term, term.name, term.weight
        self.weights = getattr(term, "weights", None)
        self.seen: list[Tensor] = []

    def __call__(self, x0: Tensor, *rest: Any) -> Any:
        self.seen.append(x0)
        return self.term(x0, *rest)


@pytest.mark.parametrize("step", [0, 1])
def test_fake_score_learns_from_the_generators_own_images(step: int) -> None:
    """The images come from the generator as it was before its update, are the same in all terms, and are detached."""
    run = build_run(generator_every=2)
    run.generator_terms = [Spy(term) for term in run.generator_terms]  # type: ignore[misc]
    run.fake_score_terms = [Spy(term) for term in run.fake_score_terms]  # type: ignore[misc]
    before = copy.deepcopy(run.roles.generator)
    two_time_scale_step(run, step, real_batch(), draws_of(step))
    with torch.no_grad():
        batch = run.inputs(before, draws_of(step), real_batch())
        expected = before.denoise(batch.noisy, batch.level, batch.condition)
    spies = [*run.generator_terms, *run.fake_score_terms]
    assert [len(spy.seen) for spy in spies] == ([1, 1, 1, 1] if step == 0 else [0, 0, 1, 1])
    for spy in spies:
        for images in spy.seen:
            assert not images.requires_grad
            assert torch.equal(images, expected)


def test_paired_rows_are_kept_from_the_fake_score() -> None:
    """Only fresh rows are samples of the generator's distribution; pairs are for the regression alone."""
    run = build_run()
    inputs = run.inputs

    def with_pairs(generator: Any, draws: Draws, real: RealBatch) -> GeneratorInput:
        fresh = inputs(generator, draws, real)
        again = Condition.cat([fresh.condition, fresh.condition])
        noisy, level = torch.cat([fresh.noisy, -fresh.noisy]), fresh.level.repeat(2)
        return GeneratorInput(noisy, level, again, BATCH, torch.zeros(BATCH, *SHAPE))

    run.inputs = with_pairs
    run.fake_score_terms = [Spy(term) for term in run.fake_score_terms]  # type: ignore[misc]
    before = copy.deepcopy(run.roles.generator)
    two_time_scale_step(run, 0, real_batch(), draws_of(0))
    fresh = inputs(before, draws_of(0), real_batch())
    with torch.no_grad():
        expected = before.denoise(fresh.noisy, fresh.level, fresh.condition)
    for spy in run.fake_score_terms:
        (images,) = spy.seen  # type: ignore[attr-defined]
        assert images.shape == (BATCH, *SHAPE)
        assert relative_error(images, expected) < 1e-5
    run.generator_every = 2
    made, denoise = [], run.roles.generator.denoise
    run.roles.generator.denoise = lambda noisy, *rest: made.append(len(noisy)) or denoise(noisy, *rest)  # type: ignore
    for step in (0, 1):  # on other turns nobody reads the pairs, and nobody makes them
        two_time_scale_step(run, step, real_batch(), draws_of(step))
    assert made == [2 * BATCH, BATCH]


@pytest.mark.slow
def test_gradient_norms_are_clipped() -> None:
    """The reported norms are those before clipping; what is applied is bounded by max_grad_norm."""
    found = {}
    for limit in (1e-3, 1e9):
        run = build_run(make_optimizer=sgd, max_grad_norm=limit)
        roles = run.roles
        trained = nn.ModuleList([roles.fake_score, roles.discriminator])  # type: ignore[list-item]
        before, fake_before = copy_of(roles.generator), copy_of(trained)
        metrics = two_time_scale_step(run, 0, real_batch(), draws_of(0))
        norms = metrics["generator_grad_norm"], metrics["fake_score_grad_norm"]
        changes = flat_change(before, roles.generator), flat_change(fake_before, trained)
        found[limit] = [float(norm) for norm in norms], changes
    (clipped_norms, clipped), (free_norms, free) = found[1e-3], found[1e9]
    assert clipped_norms == free_norms  # reported before clipping
    for norm, short, whole in zip(free_norms, clipped, free, strict=True):
        assert norm > 0.01  # else nothing was clipped
        assert float(whole.norm()) == pytest.approx(norm, rel=1e-3)
        assert float(short.norm()) == pytest.approx(1e-3, rel=1e-3)
        assert float(nn.functional.cosine_similarity(short, whole, dim=0)) > 0.999  # shortened, not bent


def test_metric_names() -> None:
    run = build_run(generator_every=2)
    turn = two_time_scale_step(run, 0, real_batch(), draws_of(0))
    other = two_time_scale_step(run, 1, real_batch(), draws_of(1))
    assert turn.keys() == GENERATOR_METRICS | FAKE_SCORE_METRICS
    assert other.keys() == FAKE_SCORE_METRICS
    for name, value in {**turn, **other}.items():
        assert value.shape == (), name
        assert not value.requires_grad, name
        assert torch.isfinite(value), name


@pytest.mark.slow
def test_norms_at_x0_are_those_of_the_weighted_terms() -> None:
    run = build_run()
    before = copy.deepcopy(run.roles)
    metrics = two_time_scale_step(run, 0, real_batch(), draws_of(0))
    norms = {}
    for name, (loss, gradient) in expected_generator_terms(before, draws_of(0)).items():
        norms[name] = float(gradient.norm())
        assert float(metrics[f"{name}_loss"]) == pytest.approx(float(loss), rel=1e-4)
        assert float(metrics[f"{name}_norm_at_x0"]) == pytest.approx(norms[name], rel=1e-4)
    ratio = norms["gan_generator"] / norms["distribution_matching"]
    assert float(metrics["gan_generator_norm_ratio"]) == pytest.approx(ratio, rel=1e-4)


@pytest.mark.slow
def test_one_step_recomputed_in_float64() -> None:
    """Both gradients of a generator step, from the equations of METHOD sections 1 to 3."""
    run = build_run(make_optimizer=sgd, max_grad_norm=1e9)
    roles = copy.deepcopy(run.roles)
    applied = record_gradients(run)
    metrics = two_time_scale_step(run, 0, real_batch(), draws_of(0))

    x0 = generated(roles.generator, draws_of(0))
    terms = expected_generator_terms(roles, draws_of(0))
    x0.backward(sum(result.gradient for result in terms.values()))
    expected = flat([parameter.grad for parameter in doubled(roles.generator).parameters()])
    assert_close(applied["generator"], expected)
    assert float(metrics["generator_grad_norm"]) == pytest.approx(float(expected.norm()), rel=1e-4)

    fake_loss, disc_loss, gradient = expected_fake_score_gradient(roles, x0.detach(), real_batch(), draws_of(0))
    assert_close(applied["fake_score"], gradient)
    assert float(metrics["fake_score_loss"]) == pytest.approx(fake_loss, rel=1e-5)
    assert float(metrics["gan_discriminator_loss"]) == pytest.approx(disc_loss, rel=1e-5)
    assert float(metrics["fake_score_grad_norm"]) == pytest.approx(float(gradient.norm()), rel=1e-4)


@pytest.mark.slow
def test_a_step_that_is_not_the_generators_has_the_same_fake_score_gradient() -> None:
    """The fake score's update does not know whose turn it was."""
    found = []
    for generator_every, step in ((1, 3), (2, 3)):
        run = build_run(generator_every=generator_every, make_optimizer=sgd, max_grad_norm=1e9)
        applied = record_gradients(run)
        two_time_scale_step(run, step, real_batch(), draws_of(step))
        found.append(applied["fake_score"])
    assert_close(found[0], found[1])


class NoBlockingCopy(TorchDispatchMode):
    """Fails on operations that make the host wait for the device, with the meta device standing in for a GPU.

    A value read back cannot be run on meta at all; a copy from pageable memory runs, but a GPU would wait for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
            source, target = args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type
            if source != target:
                self.copies.append(f"{tuple(args[0].shape)} from {source} to {target}")
        return func(*args, **kwargs)


@pytest.fixture
def clip_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's foreach kernels, which the step asks for, do not exist on meta."""
    original = nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        nn.utils, "clip_grad_norm_", lambda parameters, norm, **_: original(parameters, norm, foreach=False)
    )


@pytest.mark.slow
@pytest.mark.usefixtures("clip_on_meta")
@pytest.mark.parametrize("step_indices", [(999,), (999, 749, 499, 249)])
def test_the_host_never_reads_a_value_of_the_device(step_indices: tuple[int, ...]) -> None:
    """On meta there are no values, so reading one (`item`, `tolist`, an `if` on a tensor, a mask) raises."""
    run = build_run(device="meta", generator_every=2, make_optimizer=sgd, step_indices=step_indices)
    for step in range(2):
        metrics = two_time_scale_step(run, step, real_batch("meta"), draws_of(step, "meta"))
        assert all(value.device.type == "meta" for value in metrics.values())


@pytest.mark.slow
@pytest.mark.usefixtures("clip_on_meta")
def test_the_host_never_waits_for_a_copy() -> None:
    run = build_run(device="meta", make_optimizer=sgd)
    real, draws = real_batch("meta"), draws_of(0, "meta")
    two_time_scale_step(run, 0, real, draws)  # what is copied once may be kept
    with NoBlockingCopy() as seen:
        two_time_scale_step(run, 1, real, draws_of(1, "meta"))
    assert not seen.copies


@dataclass(frozen=True)
class Stored:
    """Embeddings in host memory."""

    embeddings: TextEmbeddings

    def __len__(self) -> int:
        return len(self.embeddings.text)

    def rows(self, index: Tensor) -> TextEmbeddings:
        return self.embeddings.rows(index)

    def texts(self, index: Tensor) -> list[str]:
        return [f"prompt {number}" for number in index.tolist()]


def test_prompts_and_pairs_are_looked_up_on_the_host(tmp_path: Path) -> None:
    """Their rows lie in host memory: the same numbers as on the device, drawn there, and one copy that nobody waits for."""
    family, size, count = family_named("sd"), (64, 64), 8
    source = TextEmbeddings(torch.arange(5.0).view(5, 1, 1).expand(5, 77, 16).clone())
    table = PromptTable(Stored(source), source.rows(slice(0, 1)), family, size)
    there, here = Draws.of_batch(1, 2, count, "meta"), Draws.of_batch(1, 2, count)
    uniform_condition(table, there)  # the empty prompt is copied once
    with NoBlockingCopy() as seen:
        condition = uniform_condition(table, there)
    assert not seen.copies
    assert condition["text"].shape == (count, 77, 16)
    assert condition["text"].device.type == "meta"
    drawn = there.part(slice(2, 6)).on_host()
    assert torch.equal(drawn.integers("generator_label", 0, 5), here.integers("generator_label", 0, 5)[2:6])
    expected = source.text[here.integers("generator_label", 0, 5)]
    assert torch.equal(uniform_condition(table, here)["text"], expected)
    folder = tmp_path / "pairs"
    images, noise = torch.zeros(3, *SHAPE, dtype=torch.uint8), torch.zeros(3, *SHAPE)
    folder.mkdir()
    write_manifest(
        folder, {"shards": [write_shard(folder, 0, noise, images, torch.tensor([2, 0, 1]))], "complete": True}
    )
    pairs = PairedInputs(StepSchedule((999,)), table, NoiseImagePairs(folder))
    network: Any = tiny_denoiser().to("meta")
    real = real_batch("meta")
    pairs(network, there, real)
    with NoBlockingCopy() as seen:
        assert pairs(network, there, real).target.device.type == "meta"  # type: ignore[union-attr]
    assert not seen.copies


@pytest.mark.parametrize(("place", "waits"), [("cpu", True), ("meta", False)])
def test_embeddings_have_arrived_when_they_are_in_host_memory(place: str, waits: bool) -> None:
    """A copy to the host that nobody waits for is read before it is there; a conversion stands in for a GPU's tensors."""
    asked: list[bool] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default:
                asked.append(bool((kwargs or {}).get("non_blocking")))
            return func(*args, **(kwargs or {}))

    embeddings = TextEmbeddings(torch.zeros(2, 5, 3).half(), torch.zeros(2, 4).half())
    with Copies():
        embeddings.to(place)
    assert asked == [not waits] * 2


@pytest.fixture
def no_reading_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(name: str) -> Callable[..., Any]:
        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"Tensor.{name} waits for the device")

        return read

    # the one number that is the same for all samples is drawn on the CPU, from Python's integers alone
    monkeypatch.setattr(Draws, "shared_integer", lambda self, purpose, high: 0)
    monkeypatch.setattr(Draws, "_in_numpy", lambda self: False)  # a CPU's way, which no device takes
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(Tensor, name, refuse(name))
    yield
    monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.usefixtures("no_reading_back")
def test_library_code_reads_no_tensor_back() -> None:
    """The same on the CPU with the optimisers of a real run, where meta cannot go."""
    fused = functools.partial(torch.optim.AdamW, lr=1e-3, fused=True)
    run = build_run(generator_every=2, make_optimizer=fused)
    for step in range(2):
        two_time_scale_step(run, step, real_batch(), draws_of(step))


# --- The independent recomputation, float64 from the levels on


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Same direction and length to float32's accuracy through the networks."""
    assert expected.norm() > 0
    assert float((actual - expected).norm() / expected.norm()) < 2e-5


def flat(gradients: list[Tensor | None]) -> Tensor:
    return torch.cat([gradient.detach().double().flatten() for gradient in gradients if gradient is not None])


def record_gradients(run: Distillation) -> dict[str, Tensor]:
    """Gradients as the two optimisers meet them."""
    found: dict[str, Tensor] = {}

    def remember(name: str, optimizer: torch.optim.Optimizer) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def hook(*_: Any) -> None:
            assert all(parameter.grad is not None for parameter in parameters)
            found[name] = flat([parameter.grad for parameter in parameters])

        optimizer.register_step_pre_hook(hook)

    remember("generator", run.generator_update.optimizer)
    remember("fake_score", run.fake_score_update.optimizer)
    return found


@functools.lru_cache(maxsize=16)
def doubled(module: nn.Module) -> Any:
    """The one float64 copy of a network."""
    return copy.deepcopy(module).double()


def column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def sigma_at(index: Tensor) -> Tensor:
    """METHOD section 5's grid, rounded to float32 as the library holds it."""
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigma = (low + index.double() / 999 * (high - low)) ** 7
    library = KarrasSchedule().grid[index].double()
    assert ((sigma - library).abs() <= 1e-6 * sigma).all()
    return library


def denoise(network: EDMDenoiser, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """D = c_skip x + c_out F(c_in x; ln(sigma) / 4), METHOD section 7, with sigma_data = 1/2."""
    s = column(sigma)
    raw, _ = doubled(network).model(noisy / (s**2 + 0.25).sqrt(), sigma.log() / 4, labels)
    return 0.25 / (s**2 + 0.25) * noisy + 0.5 * s / (s**2 + 0.25).sqrt() * raw


def logits(roles: Any, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    scaled = noisy / (column(sigma) ** 2 + 0.25).sqrt()
    _, (feature,) = doubled(roles.fake_score).model(scaled, sigma.log() / 4, labels, "features")
    return nn.Sequential.forward(doubled(roles.discriminator), feature).flatten()


def softplus(values: Tensor) -> Tensor:
    return torch.log1p(values.exp())


def one_hot(labels: Tensor) -> Tensor:
    return (labels[:, None] == torch.arange(CLASSES)).double()


def labels_of(draws: Draws) -> Tensor:
    return one_hot(draws.integers("generator_label", 0, CLASSES))


def generated(generator: EDMDenoiser, draws: Draws) -> Tensor:
    noise = draws.normal("generator_noise", SHAPE).double()
    return denoise(generator, 80 * noise, torch.full((BATCH,), 80.0, dtype=torch.float64), labels_of(draws))


def expected_generator_terms(roles: Any, draws: Draws) -> dict[str, TermResult]:
    """Unweighted loss and weighted gradient at x0 of both generator terms."""
    labels = labels_of(draws)
    x0 = generated(roles.generator, draws).detach().requires_grad_(True)

    sigma = sigma_at(draws.integers("dm_level", 20, 981))
    noisy = (x0 + column(sigma) * draws.normal("dm_noise", SHAPE).double()).detach()
    with torch.no_grad():
        mu_real, mu_fake = denoise(roles.teacher, noisy, sigma, labels), denoise(roles.fake_score, noisy, sigma, labels)
        scale = torch.stack([(x - mu).abs().mean() for x, mu in zip(x0, mu_real, strict=True)])
        target = x0 - (mu_fake - mu_real) / column(scale)
    matching = 0.5 * ((x0 - target) ** 2).mean()

    sigma = sigma_at(draws.integers("gan_level", 0, 1000))
    noisy = x0 + column(sigma) * draws.normal("gan_noise", SHAPE).double()
    adversarial = softplus(-logits(roles, noisy, sigma, labels)).mean()

    results = {}
    for name, loss, weight in (("distribution_matching", matching, 1.0), ("gan_generator", adversarial, GAN)):
        (gradient,) = torch.autograd.grad(loss, x0)
        results[name] = TermResult(loss.detach(), weight * gradient)
    return results


def expected_fake_score_gradient(roles: Any, x0: Tensor, real: RealBatch, draws: Draws) -> tuple[float, float, Tensor]:
    """Both losses and the gradient of fake score and head, real and generated images in forwards of their own."""
    labels = labels_of(draws)
    for network in (roles.fake_score, roles.discriminator):
        doubled(network).zero_grad(set_to_none=True)

    sigma = sigma_at(draws.integers("fake_level", 0, 1000))
    noisy = x0 + column(sigma) * draws.normal("fake_noise", SHAPE).double()
    squared = (denoise(roles.fake_score, noisy, sigma, labels) - x0) ** 2
    denoising = (column(sigma**-2 + 0.5**-2) * squared).mean()

    sigma = sigma_at(draws.integers("disc_level_real", 0, 1000))
    noisy = real.images.double() + column(sigma) * draws.normal("disc_noise_real", SHAPE).double()
    assert real.condition["class_labels"] is not None
    real_logits = logits(roles, noisy, sigma, real.condition["class_labels"].double())
    sigma = sigma_at(draws.integers("disc_level_generated", 0, 1000))
    noisy = x0 + column(sigma) * draws.normal("disc_noise_generated", SHAPE).double()
    adversarial = softplus(logits(roles, noisy, sigma, labels)).mean() + softplus(-real_logits).mean()

    (denoising + DISC * adversarial).backward()
    modules = (doubled(roles.fake_score), doubled(roles.discriminator))
    gradient = flat([parameter.grad for module in modules for parameter in module.parameters()])
    return float(denoising.detach()), float(adversarial.detach()), gradient
