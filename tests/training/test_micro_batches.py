"""One global batch in micro-batches: the same samples, the same gradients, in every memory mode, to float64's precision."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.condition import ClassTable, Condition
from fewstep.diffusion.draws import Draws, Purpose
from fewstep.diffusion.schedules import StepSchedule
from fewstep.distillation.divergence import DivergenceWeights
from fewstep.distillation.inputs import FreshInputs, RealBatch
from fewstep.distillation.roles import Roles, build_lora_generator_roles, build_roles, build_shared_base_roles
from fewstep.distillation.sharding import Spread, as_placed, whole
from fewstep.distillation.terms import (
    DenoisingAndAdversarial,
    DiscriminatorAdversarial,
    DistributionMatching,
    Divergence,
    FakeScoreDenoising,
    GeneratorAdversarial,
)
from fewstep.networks.adapters import LoraShape
from fewstep.networks.frozen_layers import BaseStorage
from fewstep.parallel import local_batch
from fewstep.training.step import Distillation, two_time_scale_step
from fewstep.training.update import Update
from tests.conftest import tiny_denoiser
from tests.tiny_networks import tiny_condition, tiny_text_denoiser

BATCH = 8


class ExactDraws(Draws):
    """The same numbers in float64."""

    def normal(self, purpose: Purpose, shape: tuple[int, ...], number: int = 0) -> Tensor:
        return super().normal(purpose, shape, number).double()


@dataclass(frozen=True)
class Rows:
    """Prompts of a tiny text model, in float64."""

    condition: Condition
    num_rows: int = BATCH
    on_host: bool = True

    def rows(self, index: Tensor, device: torch.device | None = None) -> Condition:
        return Condition.cat([self.condition[slice(number, number + 1)] for number in index.tolist()])


def build(
    kind: str, microbatch_size: int, spread: Spread | None = None, rate: float = 1.0
) -> tuple[Distillation, RealBatch]:
    """Four-step distillation with a GAN; adapters and heads random, so that every gradient is there.

    `kind` is a family and its memory mode, or edm and a divergence; "shared" where the GAN reads the scores' noisy images; and "taps" where it
    reads features at three depths. With a divergence each sample is at a step of its own.
    """
    words = kind.split()
    shared, family, mode = "shared" in words, words[0], " ".join(set(words[1:]) - {"shared", "taps"})
    depths = [0.25, 0.5, 1.0] if "taps" in words else [0.5]
    lora = LoraShape(rank=2, alpha=2.0)
    if family != "edm":
        tiny_text_denoiser(family)  # made once, with random numbers: before the heads' start
    torch.manual_seed(0)
    if family == "edm":
        teacher, table = tiny_denoiser(), ClassTable(4)
        teacher.tap_at(depths)
        roles = build_roles(teacher, True, spread=spread)
    else:
        teacher, table = tiny_text_denoiser(family), Rows(tiny_condition(family, BATCH, dtype=torch.float64))
        teacher.tap_at(depths)
        roles = {
            "full": lambda: build_roles(teacher, True, spread=spread),
            "lora_generator": lambda: build_lora_generator_roles(teacher, lora, True, BaseStorage(), False, spread),
            "shared_base": lambda: build_shared_base_roles(teacher, lora, True, BaseStorage(), True, spread),
        }[mode]()
    randomise(roles)
    shape = roles.teacher.image_shape
    first, own = local_batch(BATCH)
    rows = torch.arange(first, first + own)
    images = torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[rows]
    condition = table.rows(rows % 4)
    if family == "edm":
        condition = Exact(table).rows(rows % 4)
    matching = DistributionMatching(roles.teacher, roles.fake_score, 2.0 if family != "edm" else 1.0, 20, 980)
    if family == "edm" and mode:
        assert roles.discriminator is not None
        matching.divergence = Divergence(roles.discriminator, DivergenceWeights(mode, 1000))
    turn = (
        FakeScoreDenoising(roles.fake_score),
        DiscriminatorAdversarial(roles.fake_score, roles.discriminator, 0.2),  # type: ignore[arg-type]
    )
    run = Distillation(
        roles=roles, inputs=FreshInputs(
            StepSchedule((999, 749, 499, 249)), table if family != "edm" else Exact(table), matching.divergence is not None,
        ),
        generator_terms=[
            matching,
            GeneratorAdversarial(roles.fake_score, roles.discriminator, 0.3, beside=matching if shared else None),  # type: ignore[arg-type]
        ],
        fake_score_terms=[DenoisingAndAdversarial(*turn)] if shared else list(turn),
        generator_update=update(roles.generator_parameters(), [roles.generator], rate),
        fake_score_update=update(roles.fake_score_parameters(), [roles.fake_score, roles.discriminator], rate),
        generator_every=1, microbatch_size=microbatch_size, weighed=matching if matching.divergence is not None else None,
    )  # fmt: skip
    return run, RealBatch(images, condition)


@dataclass(frozen=True)
class Exact:
    """A table's conditions in float64."""

    table: Any
    on_host = False

    @property
    def num_rows(self) -> int:
        return int(self.table.num_rows)

    def rows(self, index: Tensor, device: torch.device | None = None) -> Condition:
        found = self.table.rows(index, device)
        return Condition.from_one_hot(found["class_labels"].double())


def randomise(roles: Roles) -> None:
    for number, network in enumerate((roles.generator, roles.fake_score, roles.discriminator)):
        assert network is not None
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for part in network.parameters():
                noise = {"": 0.05 * torch.randn(part.shape, generator=generator)}
                part.add_(as_placed(noise, {"": part})[""])
    for network in (roles.teacher, roles.generator, roles.fake_score, roles.discriminator):
        assert network is not None
        network.double()


def update(parameters: dict[str, Any], modules: list[Any], rate: float) -> Update:
    """Plain gradient descent, so that a change of the weights is the gradient; AdamW at smaller rates."""
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    if rate < 1:
        optimizer = torch.optim.AdamW(parameters.values(), lr=rate, fused=True)  # type: ignore[assignment]
    return Update(parameters, rate, optimizer, 1e9 if rate == 1 else 1.0, modules=modules)


def gradients(
    kind: str, microbatch_size: int, spread: Spread | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What one step changed in generator, and in fake score and head, at rate 1; and its metrics."""
    run, real = build(kind, microbatch_size, spread)
    before = [flat(update) for update in (run.generator_update, run.fake_score_update)]
    first, own = local_batch(BATCH)
    draws = ExactDraws.of_batch(3, 5, own, first=first)
    metrics = two_time_scale_step(run, 5, real, draws)
    after = [flat(update) for update in (run.generator_update, run.fake_score_update)]
    return before[0] - after[0], before[1] - after[1], metrics


def flat(update: Update) -> Tensor:
    return torch.cat([whole(parameter.detach()).flatten() for parameter in update.parameters.values()]).clone()


@pytest.mark.parametrize(
    "kind",
    [
        "edm",
        "edm hellinger",
        "edm shared",
        "sd shared_base shared",
        "edm hellinger taps",
        "sd3 lora_generator taps",
        pytest.param("sdxl shared_base shared taps", marks=pytest.mark.long),
        pytest.param("sd full", marks=pytest.mark.long),
        "sdxl lora_generator",
        "sd shared_base",
        "sd3 full",
    ],
)
def test_micro_batches_give_the_whole_batchs_gradients(kind: str) -> None:
    whole = gradients(kind, 0)
    assert all(float(part.norm()) > 5e-4 for part in whole[:2])
    for size in (4, 3, 2):
        parts = gradients(kind, size)
        for mine, theirs in zip(parts[:2], whole[:2], strict=True):
            assert float((mine - theirs).norm() / theirs.norm()) < 1e-10
        assert parts[2].keys() == whole[2].keys()
        for name, value in whole[2].items():
            assert float(parts[2][name]) == pytest.approx(float(value), rel=1e-6), name
