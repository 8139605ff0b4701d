"""The GAN on the noisy images that the scores read (losses.gan_levels = "shared"): the same losses at that noise, in fewer passes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.draws import Draws
from fewstep.distillation.inputs import GeneratorInput, RealBatch
from fewstep.distillation.terms import (
    DenoisingAndAdversarial,
    DiscriminatorAdversarial,
    DistributionMatching,
    FakeScoreDenoising,
    GeneratorAdversarial,
)
from fewstep.errors import UserError
from fewstep.models.load import load_teacher
from fewstep.models.model import Model
from fewstep.networks.discriminator import Discriminator
from fewstep.settings import TrainSettings, parse_settings
from fewstep.training.build import build_distillation
from tests.conftest import relative_error, tiny_denoiser

SHAPE, COUNT = (1, 16, 16), 3


def test_both_losses_and_their_gradients_are_those_of_two_forwards_at_one_noise() -> None:
    fake_score, draws = tiny_denoiser(seed=2), Draws.of_batch(1, 2, COUNT)
    torch.manual_seed(3)
    head = Discriminator(fake_score.feature_shapes[0])
    denoising, adversarial = FakeScoreDenoising(fake_score), DiscriminatorAdversarial(fake_score, head, 0.5)
    term = DenoisingAndAdversarial(denoising, adversarial)
    assert term.weights == {"fake_score": 1.0, "gan_discriminator": 0.5}
    x0, condition = torch.randn(COUNT, *SHAPE), Condition.from_labels(torch.tensor([0, 1, 2]), 4)
    real = RealBatch(torch.randn(COUNT, *SHAPE), Condition.from_labels(torch.tensor([3, 1, 0]), 4))
    parameters = [*fake_score.parameters(), *head.parameters()]

    rows: list[int] = []
    fake_score.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
    together = term(x0, condition, real, draws)
    assert rows == [COUNT, COUNT]  # apart: 3, and 6 in the encoder
    found = torch.autograd.grad(together["fake_score"] + 0.5 * together["gan_discriminator"], parameters)

    index, noise = draws.integers("fake_level", 0, 1000), draws.normal("fake_noise", SHAPE)
    apart = denoising.at(x0, condition, index, noise)
    real_index, real_noise = draws.integers("disc_level_real", 0, 1000), draws.normal("disc_noise_real", SHAPE)
    told = adversarial.at(x0, condition, real, real_index, real_noise, index, noise)
    torch.testing.assert_close(together["fake_score"], apart)
    torch.testing.assert_close(together["gan_discriminator"], told)
    for mine, theirs in zip(found, torch.autograd.grad(apart + 0.5 * told, parameters), strict=True):
        assert relative_error(mine, theirs) < 1e-4


def test_the_generator_is_judged_where_its_scores_are() -> None:
    teacher, fake_score, draws = tiny_denoiser(seed=1), tiny_denoiser(seed=2), Draws.of_batch(3, 4, COUNT)
    head = Discriminator(fake_score.feature_shapes[0])
    matching = DistributionMatching(teacher, fake_score, 1.0, 20, 980)
    condition, level = Condition.from_labels(torch.tensor([0, 1, 2]), 4), torch.full((COUNT,), 80.0)
    batch, x0 = GeneratorInput(torch.randn(COUNT, *SHAPE), level, condition, COUNT), torch.randn(COUNT, *SHAPE)
    shared = GeneratorAdversarial(fake_score, head, 1.0, beside=matching)
    own = GeneratorAdversarial(fake_score, head, 1.0)
    at_the_scores = own.at(x0, batch, draws.integers("dm_level", 20, 981), draws.normal("dm_noise", SHAPE))
    assert torch.equal(shared(x0, batch, draws).gradient, at_the_scores.gradient)
    assert not torch.equal(own(x0, batch, draws).gradient, at_the_scores.gradient)


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Model:
    return load_teacher(teacher_folder, device="cpu")


def settings(**losses: Any) -> TrainSettings:
    return parse_settings(TrainSettings, {"losses": losses}, "test")


def test_the_setting_builds_it(teacher: Model) -> None:
    given = settings(gan_weights=[3e-3, 1e-2], gan_levels="shared")
    run = build_distillation(given, teacher, teacher.conditioner.every)
    assert [type(term) for term in run.fake_score_terms] == [DenoisingAndAdversarial]
    matching, adversarial = run.generator_terms
    assert isinstance(adversarial, GeneratorAdversarial)
    assert adversarial.beside is matching


@pytest.mark.parametrize(
    ("losses", "named"),
    [
        ({"gan_levels": "shared"}, "there is no GAN"),
        ({"gan_levels": "shared", "gan_weights": [1, 1], "distribution_matching_weight": 0}, "whose weight is 0"),
        ({"gan_levels": "own"}, "losses.gan_levels='own': a grid index, -1 for none, or 'shared'$"),
        ({"gan_levels": -2}, "losses.gan_levels=-2: a grid index"),
        ({"gan_levels": 0.5}, "losses.gan_levels=0.5: a grid index"),
        ({"gan_levels": True}, "losses.gan_levels=True: a grid index"),
    ],
)
def test_what_cannot_be_shared_is_refused(losses: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        settings(**losses)


def test_the_earlier_name_is_read() -> None:
    assert settings(gan_max_level_index=300).losses.gan_levels == 300
