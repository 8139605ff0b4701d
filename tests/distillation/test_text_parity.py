"""Parity: the formulas of the method, written out again around the raw diffusers network in float64, give our quantities.

Nothing of ours takes part in the expected values: neither the denoiser nor schedules, guidance, losses or the head.
Where ours runs in float32 the tolerance is 1e-4: a forward of these networks is exact to about 1e-6 there, and
epsilon-prediction at level 980 multiplies that by sigma / alpha = 13, guidance by up to 15.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.schedules import StepSchedule
from fewstep.distillation.inputs import GeneratorInput, RealBatch, simulated_input
from fewstep.distillation.terms import (
    DiscriminatorAdversarial,
    DistributionMatching,
    FakeScoreDenoising,
    GeneratorAdversarial,
)
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.families.stable_diffusion.denoiser import DiffusersUNetDenoiser
from fewstep.networks.discriminator import Discriminator
from tests.conftest import relative_error
from tests.tiny_networks import tiny_condition, tiny_text_denoiser

SIZE, SHAPE = 3, (4, 16, 16)  # 16x16 latents: an 8x8 bottleneck, so that the head halves once
MATCHING_INDEX, ANY_INDEX = torch.tensor([20, 500, 980]), torch.tensor([0, 640, 999])
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CASES = ["sd epsilon", "sd v_prediction", "sd v_prediction, zero terminal signal", "sdxl epsilon", "sd3 flow"]
Parts = tuple[Tensor, Tensor | None, Tensor | None]  # text, pooled, time ids


class Raw:
    """A diffusers network in float64 and what the method says about its levels and its prediction."""

    def __init__(self, network: Any, family: str, prediction: str, zero_terminal: bool) -> None:
        self.network = copy.deepcopy(network).double()
        self.family, self.prediction = family, prediction
        scheduler: Any = DDPMScheduler(**BETAS, rescale_betas_zero_snr=zero_terminal)
        self.cumprod = scheduler.alphas_cumprod.double()

    def alpha_sigma(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, 1, 1) each."""
        if self.family == "sd3":
            sigma = self.time(index)
            alpha = 1 - sigma
        else:
            alpha, sigma = self.cumprod[index].sqrt(), (1 - self.cumprod[index]).sqrt()
        return alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)

    def time(self, index: Tensor) -> Tensor:
        """SD 3: t = 3 u / (1 + 2 u), u = (i + 1) / 1000."""
        u = (index.double() + 1) / 1000
        return 3 * u / (1 + 2 * u)

    def noised(self, x0: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(index)
        return alpha * x0 + sigma * noise

    def predict(self, noisy: Tensor, index: Tensor, parts: Parts) -> Tensor:
        text, pooled, time_ids = parts
        if self.family == "sd3":
            return self.network(noisy, text, pooled, timestep=1000 * self.time(index)).sample
        added = {"text_embeds": pooled, "time_ids": time_ids} if self.family == "sdxl" else None
        return self.network(noisy, index, text, added_cond_kwargs=added).sample

    def x0(self, noisy: Tensor, index: Tensor, parts: Parts) -> Tensor:
        alpha, sigma = self.alpha_sigma(index)
        raw = self.predict(noisy, index, parts)
        if self.prediction == "epsilon":
            return (noisy - sigma * raw) / alpha
        return alpha * noisy - sigma * raw if self.prediction == "v_prediction" else noisy - sigma * raw

    def target(self, x0: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(index)
        return {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "flow": noise - x0}[self.prediction]

    def feature(self, noisy: Tensor, index: Tensor, parts: Parts) -> Tensor:
        """Mid-block output; SD 3: image tokens after the middle of three blocks, as a map."""
        seen: list[Any] = []
        middle = self.network.transformer_blocks[1] if self.family == "sd3" else self.network.mid_block
        hook = middle.register_forward_hook(lambda module, inputs, output: seen.append(output))
        self.predict(noisy, index, parts)
        hook.remove()
        if self.family != "sd3":
            return seen[0]
        tokens = seen[0][1]
        return tokens.reshape(len(tokens), 8, 8, -1).movedim(-1, 1)


def head_logits(head: Discriminator, feature: Tensor) -> Tensor:
    """METHOD section 2 from the head's weights alone: 8x8 -> 4x4 by stride 2, 4x4 valid, then 1x1; 8 groups of 32."""
    weights = {name: value.detach().double() for name, value in head.named_parameters()}
    assert sorted({int(name.split(".")[0]) for name in weights}) == [0, 1, 3, 4, 6]
    x = F.conv2d(feature, weights["0.weight"], weights["0.bias"], stride=2, padding=1)
    x = F.silu(F.group_norm(x, 8, weights["1.weight"], weights["1.bias"], 1e-5))
    x = F.conv2d(x, weights["3.weight"], weights["3.bias"])
    x = F.silu(F.group_norm(x, 8, weights["4.weight"], weights["4.bias"], 1e-5))
    return F.conv2d(x, weights["6.weight"], weights["6.bias"]).flatten()


def softplus(values: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(values))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """One parameterisation: our networks and the raw ones with the same weights, conditions, images and noises."""

    def __init__(self, name: str) -> None:
        self.family, self.prediction = name.split(",")[0].split()
        options = {} if self.prediction == "flow" else {"prediction_type": self.prediction}
        self.teacher: DiffusersDenoiser = tiny_text_denoiser(self.family, resolution=32, **options)
        zero_terminal = "zero" in name
        if zero_terminal:
            config = {**BETAS, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
            self.teacher = DiffusersUNetDenoiser(self.teacher.network, config, 16)
        assert self.teacher.image_shape == SHAPE
        assert self.teacher.feature_shapes[0] == (32, 8, 8)
        self.fake_score = copy.deepcopy(self.teacher)
        with torch.no_grad():
            for number, parameter in enumerate(self.fake_score.parameters()):
                parameter.add_(0.3 * parameter.std().nan_to_num(0) * random(*parameter.shape, seed=number))
        self.raw_teacher, self.raw_fake = (
            Raw(ours.network, self.family, self.prediction, zero_terminal) for ours in (self.teacher, self.fake_score)
        )
        torch.manual_seed(0)
        self.head = Discriminator((32, 8, 8))
        self.condition = tiny_condition(self.family, SIZE, seed=1)
        self.x0, self.noise = 0.8 * random(SIZE, *SHAPE, seed=2), random(SIZE, *SHAPE, seed=3)
        level = self.teacher.noise_schedule.at(torch.full((SIZE,), 999))
        self.batch = GeneratorInput(random(SIZE, *SHAPE, seed=4), level, self.condition, SIZE)

    def parts(self, condition: Condition) -> Parts:
        """The guided branch in float64."""
        values = (condition.get(name) for name in ("text", "pooled", "time_ids"))
        return tuple(None if value is None else value.double() for value in values)  # type: ignore[return-value]

    def unconditional(self) -> Parts:
        """Zeros for SDXL with its time ids; the encoded empty prompt for the others."""
        text, pooled, time_ids = self.parts(self.condition)
        if self.family == "sdxl":
            assert pooled is not None
            return torch.zeros_like(text), torch.zeros_like(pooled), time_ids
        empty_text, empty_pooled = self.condition.empty["text"], self.condition.empty.get("pooled")
        assert isinstance(empty_text, Tensor)
        assert not isinstance(empty_pooled, str)
        pooled = None if empty_pooled is None else empty_pooled.double().repeat(SIZE, 1)
        return empty_text.double().repeat(SIZE, 1, 1), pooled, None


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_x0_conversion(case: Case) -> None:
    """In float64 to the last digits; the noisiest level too."""
    ours = copy.deepcopy(case.teacher).double()
    names = ("text", "pooled", "time_ids")
    parts = dict(zip(names, case.parts(case.condition), strict=True))
    condition = Condition(SIZE, {name: part for name, part in parts.items() if part is not None})
    noisy = case.noise.double()
    with torch.no_grad():
        found = ours.denoise(noisy, ours.noise_schedule.at(ANY_INDEX), condition)
        expected = case.raw_teacher.x0(noisy, ANY_INDEX, case.parts(case.condition))
        single = case.teacher.denoise(case.noise, case.teacher.noise_schedule.at(ANY_INDEX), case.condition)
    # SD 3: its shifted times are kept in float32 and enter the time embedding
    for number in range(SIZE):
        assert relative_error(found[number], expected[number]) < (1e-9 if case.family != "sd3" else 1e-5)
        assert relative_error(single[number], expected[number]) < 1e-4


@pytest.mark.parametrize("guidance", [1.0, 1.75, 8.0])
def test_distribution_matching(case: Case, guidance: float) -> None:
    term = DistributionMatching(case.teacher, case.fake_score, guidance, 20, 980)
    result = term.at(case.x0, case.batch, MATCHING_INDEX, case.noise)

    x0 = case.x0.double().requires_grad_(True)
    parts = case.parts(case.condition)
    with torch.no_grad():
        noisy = case.raw_teacher.noised(x0, case.noise.double(), MATCHING_INDEX)
        given = case.raw_teacher.x0(noisy, MATCHING_INDEX, parts)
        free = case.raw_teacher.x0(noisy, MATCHING_INDEX, case.unconditional())
        real = free + guidance * (given - free)
        fake = case.raw_fake.x0(noisy, MATCHING_INDEX, parts)
        direction = torch.stack([(f - r) / (x - r).abs().mean() for x, r, f in zip(x0, real, fake, strict=True)])
    loss = 0.5 * (x0 - (x0 - direction).detach()).square().mean()
    (gradient,) = torch.autograd.grad(loss, x0)

    assert relative_error(result.loss, loss.detach()) < 1e-4
    for ours, theirs in zip(result.gradient, gradient, strict=True):
        assert relative_error(ours, theirs) < 1e-4
    assert (given - free).abs().max() > 1e-3  # guidance has something to do


def test_sdxl_keeps_its_time_ids_without_a_prompt() -> None:
    case = Case("sdxl epsilon")
    _, _, time_ids = case.unconditional()
    assert time_ids is not None
    assert len(time_ids.unique(dim=0)) == 2
    assert torch.equal(case.condition.unconditional()["time_ids"].double(), time_ids)


def test_fake_score_loss_in_its_native_form(case: Case) -> None:
    """mse on epsilon, v or the flow, with its gradient for every weight."""
    index = ANY_INDEX
    fake_score = copy.deepcopy(case.fake_score)
    level = fake_score.noise_schedule.at(index)
    loss = FakeScoreDenoising(fake_score).at(case.x0, case.condition, index, case.noise)
    loss.backward()

    raw, x0, noise = case.raw_fake, case.x0.double(), case.noise.double()
    predicted = raw.predict(raw.noised(x0, noise, index), index, case.parts(case.condition))
    expected = F.mse_loss(predicted, raw.target(x0, noise, index))
    names = [name for name, _ in raw.network.named_parameters()]
    gradients = torch.autograd.grad(expected, list(raw.network.parameters()), allow_unused=True)

    assert relative_error(loss, expected.detach()) < 1e-4
    found = dict(fake_score.network.named_parameters())
    scale = max(float(gradient.abs().max()) for gradient in gradients if gradient is not None)
    for name, gradient in zip(names, gradients, strict=True):
        ours = found[name].grad
        if gradient is None:
            assert ours is None or not ours.any(), name
        else:
            assert float((ours.double() - gradient).abs().max()) < 1e-4 * scale, name
    assert fake_score.denoising_weight(level).isfinite().all()


def test_generator_adversarial(case: Case) -> None:
    result = GeneratorAdversarial(case.fake_score, case.head, 1.0).at(case.x0, case.batch, ANY_INDEX, case.noise)

    x0 = case.x0.double().requires_grad_(True)
    noisy = case.raw_fake.noised(x0, case.noise.double(), ANY_INDEX)
    logits = head_logits(case.head, case.raw_fake.feature(noisy, ANY_INDEX, case.parts(case.condition)))
    loss = softplus(-logits).mean()
    (gradient,) = torch.autograd.grad(loss, x0)

    assert relative_error(result.loss, loss.detach()) < 1e-4
    assert relative_error(result.gradient, gradient) < 1e-3  # two GroupNorms of few values in between
    assert gradient[:2].abs().amax(dim=(1, 2, 3)).min() > 0


def test_discriminator_adversarial(case: Case) -> None:
    """Real and generated images, each at its own levels and under its own condition, in separate forwards."""
    real_index, real_noise = torch.tensor([3, 999, 250]), random(SIZE, *SHAPE, seed=6)
    real = RealBatch(0.7 * random(SIZE, *SHAPE, seed=5), tiny_condition(case.family, SIZE, seed=9))
    fake_score, head = copy.deepcopy(case.fake_score), copy.deepcopy(case.head)
    loss = DiscriminatorAdversarial(fake_score, head, 1.0).at(
        case.x0, case.condition, real, real_index, real_noise, ANY_INDEX, case.noise
    )
    loss.backward()

    def logits(images: Tensor, noise: Tensor, index: Tensor, condition: Condition) -> Tensor:
        noisy = case.raw_fake.noised(images.double(), noise.double(), index)
        return head_logits(case.head, case.raw_fake.feature(noisy, index, case.parts(condition)))

    on_real = logits(real.images, real_noise, real_index, real.condition)
    on_generated = logits(case.x0, case.noise, ANY_INDEX, case.condition)
    expected = softplus(on_generated).mean() + softplus(-on_real).mean()
    assert relative_error(loss, expected.detach()) < 1e-4
    first = "pos_embed.proj.weight" if case.family == "sd3" else "conv_in.weight"
    (gradient,) = torch.autograd.grad(expected, dict(case.raw_fake.network.named_parameters())[first])
    assert relative_error(dict(fake_score.network.named_parameters())[first].grad, gradient) < 1e-3


def test_four_steps_and_their_levels(case: Case) -> None:
    steps = StepSchedule((999, 749, 499, 249))
    assert steps.indices == (999, 749, 499, 249)
    levels = case.teacher.noise_schedule.at(torch.tensor(steps.indices)).tolist()
    if case.family == "sd3":
        assert levels == pytest.approx([1.0, 0.9, 0.75, 0.5], rel=1e-6)
    else:
        assert levels == [999, 749, 499, 249]


def draws_at(number: int) -> Draws:
    """Draws of a training step that simulates step `number` of four."""
    return next(
        draws
        for draws in (Draws.of_batch(7, step, SIZE) for step in range(200))
        if draws.shared_integer("simulated_step", 4) == number
    )


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_backward_simulated_input(case: Case, number: int) -> None:
    """Pure noise at the first step; later the generator's own x0, noised with noise it has not seen."""
    indices, draws = [999, 749, 499, 249], draws_at(number)
    generator = copy.deepcopy(case.fake_score)
    noisy, level = simulated_input(generator, StepSchedule((999, 749, 499, 249)), case.condition, draws)

    noises = [draws.normal("generator_noise", SHAPE).double()]
    noises += [draws.normal("simulation_noise", SHAPE, number).double() for number in (1, 2, 3)]
    x = noises[0]
    with torch.no_grad():
        for step in range(number):
            x0 = case.raw_fake.x0(x, torch.full((SIZE,), indices[step]), case.parts(case.condition))
            x = case.raw_fake.noised(x0, noises[step + 1], torch.full((SIZE,), indices[step + 1]))
    if number == 0:
        assert torch.equal(noisy.double(), noises[0])
    assert relative_error(noisy, x) < 1e-4
    assert torch.equal(level, case.teacher.noise_schedule.at(torch.full((SIZE,), indices[number])))
    assert not noisy.requires_grad
    assert all(parameter.grad is None for parameter in generator.parameters())
    products = [(a * b).mean().abs() for i, a in enumerate(noises) for b in noises[:i]]
    assert max(products) < 5 / noises[0].numel() ** 0.5  # four independent noises


@pytest.mark.parametrize(
    "change",
    [
        lambda condition: {"empty": {**condition.empty, "text": condition.empty["text"] + 1}},
        lambda condition: {"parts": {**condition.parts, "text": condition["text"] + 1}},
    ],
    ids=["empty prompt", "prompt"],
)
def test_guidance_reads_both_branches(case: Case, change: Callable[[Condition], dict[str, Any]]) -> None:
    """Control: another prompt in either branch is another gradient."""
    term = DistributionMatching(case.teacher, case.fake_score, 1.75, 20, 980)
    other = dataclasses.replace(case.batch, condition=dataclasses.replace(case.condition, **change(case.condition)))
    results = [term.at(case.x0, batch, MATCHING_INDEX, case.noise).gradient for batch in (case.batch, other)]
    assert relative_error(results[1], results[0]) > 1e-3
