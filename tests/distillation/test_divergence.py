"""Weights of distribution matching under other divergences."""

import math
from pathlib import Path

import pytest
import torch

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.draws import Draws
from fewstep.distillation.divergence import LARGEST_RATIO, NUM_BINS, DivergenceWeights
from fewstep.distillation.inputs import GeneratorInput
from fewstep.distillation.terms import DistributionMatching, Divergence
from fewstep.errors import UserError
from fewstep.losses import DIVERGENCES, divergence_weight
from fewstep.networks.discriminator import Discriminator
from fewstep.training.checkpoint import list_checkpoints
from fewstep.training.run import train
from tests.conftest import tiny_denoiser
from tests.training.helpers import tiny_train_settings
from tests.training.test_resume import assert_identical, final_tensors

GENERATORS = {  # f of each divergence D = E_generator f(data / generator), whose h is f''(r) r^2
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "hellinger": lambda r: (1 - r.sqrt()) ** 2,
    "jeffreys": lambda r: (r - 1) * r.log(),
    "softened_reverse_kl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
}


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_weight_is_the_second_derivative_of_f(name: str) -> None:
    assert GENERATORS.keys() == DIVERGENCES.keys()
    ratio = torch.linspace(0.1, 8, 40, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(GENERATORS[name](ratio).sum(), ratio, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), ratio)
    expected = second * ratio.detach() ** 2
    found = divergence_weight(ratio.detach(), name)
    assert torch.allclose(found / found[0], expected / expected[0], rtol=1e-9)


def test_unknown_divergence_is_named() -> None:
    with pytest.raises(ValueError, match="'kl' is none of reverse_kl, "):
        divergence_weight(torch.ones(1), "kl")


def test_weights_by_hand_over_two_turns() -> None:
    """Ratios relative to the running mean of their bin, weights to their mean; means move half the way after the turn."""
    weights = DivergenceWeights("forward_kl", 1000)
    index = torch.tensor([10, 20, 999, 500])
    logits = torch.tensor([0.0, math.log(3.0), math.log(2.0), 100.0])  # the last is cut at the largest ratio
    ratio = torch.tensor([1.0, 3.0, 2.0, LARGEST_RATIO])
    assert torch.allclose(weights(logits, index), ratio / ratio.mean())
    weights.finish()
    means = torch.ones(NUM_BINS)
    means[0], means[9], means[5] = 1.5, 1.5, 5.5
    assert torch.allclose(weights.mean_ratio, means)
    relative = ratio / means[[0, 0, 9, 5]]
    assert torch.allclose(weights(logits, index), relative / relative.mean())


def test_matching_gradient_is_weighed_by_the_logits_at_its_own_noisy_images() -> None:
    teacher, fake_score, head = tiny_denoiser(seed=1), tiny_denoiser(seed=2), _head()
    x0 = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    condition = Condition.from_labels(torch.arange(4), 4)
    batch = GeneratorInput(torch.zeros_like(x0), torch.full((4,), 80.0), condition, 4, None)
    index, noise = torch.tensor([30, 400, 600, 950]), torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    plain = DistributionMatching(teacher, fake_score, 1.0, 20, 980)
    weighed = DistributionMatching(
        teacher, fake_score, 1.0, 20, 980, divergence=Divergence(head, DivergenceWeights("jeffreys", 1000))
    )
    level = teacher.noise_schedule.at(index)
    with torch.no_grad():
        logits = head(fake_score.features(teacher.add_noise(x0, noise, level), level, condition)[0])
    expected = 1 + logits.exp()
    assert float(expected.std()) > 1e-3
    found = weighed.at(x0, batch, index, noise).gradient / plain.at(x0, batch, index, noise).gradient
    assert torch.allclose(found[:, 0, 3, 5], expected / expected.mean(), rtol=1e-4)


def test_looking_first_gives_the_weights_of_the_whole_batch() -> None:
    head, weights = _head(), DivergenceWeights("hellinger", 1000)
    term = DistributionMatching(
        tiny_denoiser(seed=1), tiny_denoiser(seed=2), 1.0, 20, 980, divergence=Divergence(head, weights)
    )
    x0 = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = GeneratorInput(
        torch.zeros_like(x0), torch.full((4,), 80.0), Condition.from_labels(torch.arange(4), 4), 4, None
    )
    draws = Draws.of_batch(0, 0, 4, torch.device("cpu"))
    whole = term(x0, batch, draws).gradient
    weights.finish()
    weights.mean_ratio.fill_(1.0)
    parts = [slice(0, 2), slice(2, 4)]
    halves = [GeneratorInput(batch.noisy[rows], batch.level[rows], batch.condition[rows], 2, None) for rows in parts]
    for rows, half in zip(parts, halves, strict=True):
        term.look(x0[rows], half, draws.part(rows))
    weights.settle()
    found = torch.cat(
        [term(x0[rows], half, draws.part(rows)).gradient for rows, half in zip(parts, halves, strict=True)]
    )
    assert torch.allclose(found / 2, whole, rtol=1e-5)  # each half is a mean over half as many


@pytest.mark.slow
def test_run_trains_and_resumes_with_its_running_means(teacher_folder: Path, pictures: Path, tmp_path: Path) -> None:
    changes = {
        "losses": {"divergence": "jensen_shannon", "gan_generator_weight": 3e-3, "gan_discriminator_weight": 1e-2}
    }
    train(tiny_train_settings(teacher_folder, pictures, tmp_path / "whole", **changes))
    train(tiny_train_settings(teacher_folder, pictures, tmp_path / "parts", training={"num_steps": 3}, **changes))
    train(tiny_train_settings(teacher_folder, pictures, tmp_path / "parts", **changes))
    whole = final_tensors(tmp_path / "whole")
    assert_identical(whole, final_tensors(tmp_path / "parts"))
    assert bool((whole["divergence.mean_ratio"] != 1).any())
    plain = tiny_train_settings(teacher_folder, pictures, tmp_path / "plain")
    train(plain)
    assert "divergence.mean_ratio" not in final_tensors(tmp_path / "plain")
    other = final_tensors(tmp_path / "plain")
    assert any(not torch.equal(whole[name], other[name]) for name in other if name.startswith("generator."))
    assert list_checkpoints(tmp_path / "plain" / "checkpoints")


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (
            {"divergence": "forward_kl", "gan_generator_weight": 0, "gan_discriminator_weight": 0},
            "reads the discriminator's ratio",
        ),
        ({"divergence": "forward_kl", "gan_levels": 500}, "raise that"),
        ({"divergence": "forward_kl", "distribution_matching_weight": 0}, "whose weight is 0"),
        ({"divergence": "kl"}, "losses.divergence"),
    ],
)
def test_settings_that_do_not_go_together(losses: dict[str, object], message: str, tmp_path: Path) -> None:
    given = {"gan_generator_weight": 3e-3, "gan_discriminator_weight": 1e-2, **losses}
    with pytest.raises(UserError, match=message):
        tiny_train_settings(tmp_path, tmp_path, tmp_path / "run", losses=given)


def _head() -> Discriminator:
    torch.manual_seed(3)
    return Discriminator((32, 4, 4))
