"""Every quantity of one DMD2 step against the golden tensors, which an independent implementation computed."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.samplers import generate
from fewstep.distillation.inputs import GeneratorInput, RealBatch
from fewstep.distillation.terms import (
    DiscriminatorAdversarial,
    DistributionMatching,
    FakeScoreDenoising,
    GeneratorAdversarial,
)
from fewstep.networks.discriminator import Discriminator
from tests.conftest import GOLDEN, golden_denoiser, relative_error


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "dmd2_step.safetensors")


@pytest.fixture(scope="module")
def networks(golden: dict[str, torch.Tensor]):  # type: ignore[no-untyped-def]
    teacher, _ = golden_denoiser("adm")
    generator, fake_score = copy.deepcopy(teacher), copy.deepcopy(teacher)
    with torch.no_grad():
        for network, factor in ((fake_score, 1 + 1 / 16), (generator, 1 - 1 / 16)):
            for parameter in network.parameters():
                parameter.mul_(factor)
    head = Discriminator(teacher.feature_shapes[0])
    head.load_state_dict(
        {k.removeprefix("discriminator."): v.float() for k, v in golden.items() if k.startswith("discriminator.")}
    )
    return teacher, generator, fake_score, head


@pytest.fixture(scope="module")
def batch(golden: dict[str, torch.Tensor]) -> GeneratorInput:
    condition = Condition.from_one_hot(golden["class_labels"])
    return GeneratorInput(80 * golden["noise"], torch.full((4,), 80.0), condition, num_fresh=4)


def test_generated(golden, networks) -> None:  # type: ignore[no-untyped-def]
    level = networks[1].noise_schedule.expanded(999, 4, torch.device("cpu"))
    x0 = generate(networks[1], golden["noise"], Condition.from_one_hot(golden["class_labels"]), level)
    assert relative_error(x0, golden["generated"]) < 1e-5


def test_distribution_matching(golden, networks, batch) -> None:  # type: ignore[no-untyped-def]
    teacher, _, fake_score, _ = networks
    level = teacher.noise_schedule.at(golden["dm.level"])
    noisy = teacher.add_noise(golden["generated"], golden["dm.noise"], level)
    with torch.no_grad():
        assert relative_error(teacher.denoise(noisy, level, batch.condition), golden["dm.teacher_x0"]) < 1e-5
        assert relative_error(fake_score.denoise(noisy, level, batch.condition), golden["dm.fake_x0"]) < 1e-5
    term = DistributionMatching(teacher, fake_score, 1.0, 20, 980)
    result = term.at(golden["generated"], batch, golden["dm.level"], golden["dm.noise"])
    assert relative_error(result.loss, golden["dm.loss"]) < 1e-5
    assert relative_error(result.gradient, golden["dm.grad_at_generated"]) < 1e-4


def test_generator_adversarial(golden, networks, batch) -> None:  # type: ignore[no-untyped-def]
    _, _, fake_score, head = networks
    term = GeneratorAdversarial(fake_score, head, 1.0)
    result = term.at(golden["generated"], batch, golden["gan_gen.level"], golden["gan_gen.noise"])
    assert relative_error(result.loss, golden["gan_gen.loss"]) < 1e-5
    assert relative_error(result.gradient, golden["gan_gen.grad_at_generated"]) < 1e-4
    assert all(p.grad is None for p in [*fake_score.parameters(), *head.parameters()])


def test_fake_score_and_discriminator(golden, networks, batch) -> None:  # type: ignore[no-untyped-def]
    _, _, fake_score, head = networks
    fake_score, head = copy.deepcopy(fake_score), copy.deepcopy(head)
    x0 = golden["generated"]
    denoising = FakeScoreDenoising(fake_score).at(x0, batch.condition, golden["fake.level"], golden["fake.noise"])
    real = RealBatch(golden["real_images"], Condition.from_one_hot(golden["real_class_labels"]))
    adversarial = DiscriminatorAdversarial(fake_score, head, 0.01).at(
        x0, batch.condition, real,
        golden["gan_disc.level_real"], golden["gan_disc.noise_real"],
        golden["gan_disc.level_generated"], golden["gan_disc.noise_generated"],
    )  # fmt: skip
    assert relative_error(denoising, golden["fake.loss"]) < 1e-5
    assert relative_error(adversarial, golden["gan_disc.loss"]) < 1e-5
    (denoising + 0.01 * adversarial).backward()
    gradients = [p.grad for p in [*fake_score.parameters(), *head.parameters()] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    assert relative_error(norm, golden["fake.total_grad_norm_with_disc_weight_0.01"]) < 1e-5
