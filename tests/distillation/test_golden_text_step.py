"""Every quantity of one text-to-image DMD2 step (SD 1.5 and SDXL shapes) against the golden tensors."""

import copy
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from fewstep.diffusion.condition import Condition, Empty
from fewstep.diffusion.samplers import generate
from fewstep.distillation.inputs import GeneratorInput, RealBatch
from fewstep.distillation.terms import (
    DiscriminatorAdversarial,
    DistributionMatching,
    FakeScoreDenoising,
    GeneratorAdversarial,
)
from fewstep.families.stable_diffusion.denoiser import DiffusersUNetDenoiser
from fewstep.networks.discriminator import Discriminator
from tests.conftest import GOLDEN, relative_error

NETWORKS = json.loads((GOLDEN / "text_networks.json").read_text())


class Step:
    """The tensors and networks of one golden step."""

    def __init__(self, family: str) -> None:
        self.tensors = load_file(GOLDEN / f"dmd2_step_{family}.safetensors")
        self.timestep = NETWORKS[family]["conditioning_timestep"]
        unet = UNet2DConditionModel(**NETWORKS[family]["unet"])
        unet.load_state_dict({k: v.float() for k, v in self.part("teacher.").items()})
        self.teacher = DiffusersUNetDenoiser(unet, NETWORKS[family]["scheduler"]).eval()
        self.generator, self.fake_score = copy.deepcopy(self.teacher), copy.deepcopy(self.teacher)
        with torch.no_grad():
            for network, factor in ((self.fake_score, 1 + 1 / 16), (self.generator, 1 - 1 / 16)):
                for parameter in network.parameters():
                    parameter.mul_(factor)
        self.head = Discriminator(self.teacher.feature_shapes[0])
        self.head.load_state_dict({k: v.float() for k, v in self.part("discriminator.").items()})
        level = self.teacher.noise_schedule.expanded(self.timestep, 3, torch.device("cpu"))
        self.batch = GeneratorInput(self["noise"], level, self.condition("text_embedding", "pooled"), num_fresh=3)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def condition(self, text: str, pooled: str) -> Condition:
        values = self.tensors
        parts = {"text": values[text]}
        empty = values.get("uncond_embedding", torch.zeros_like(values[text][:1]))
        rows: dict[str, Empty] = {"text": empty.reshape(1, *values[text].shape[1:]) if empty.ndim == 2 else empty[:1]}
        if pooled in values:
            parts["pooled"], rows["pooled"] = values[pooled], torch.zeros_like(values[pooled][:1])
        if "time_ids" in values:
            parts["time_ids"], rows["time_ids"] = values["time_ids"], "same"
        return Condition(3, parts, rows)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def step(request: pytest.FixtureRequest) -> Step:
    return Step(request.param)


def test_generated(step: Step) -> None:
    with torch.no_grad():
        level = step.generator.noise_schedule.expanded(step.timestep, len(step["noise"]), torch.device("cpu"))
        x0 = generate(step.generator, step["noise"], step.batch.condition, level)
    assert relative_error(x0, step["generated"]) < 1e-5


@pytest.mark.parametrize("guidance", ["1.75", "8"])
def test_distribution_matching(step: Step, guidance: str) -> None:
    term = DistributionMatching(step.teacher, step.fake_score, float(guidance), 20, 980)
    prefix = f"dm_{guidance}."
    result = term.at(step["generated"], step.batch, step[prefix + "timestep"], step[prefix + "noise"])
    assert relative_error(result.loss, step[prefix + "loss"]) < 1e-5
    assert relative_error(result.gradient, step[prefix + "grad_at_generated"]) < 1e-4


def test_generator_adversarial(step: Step) -> None:
    term = GeneratorAdversarial(step.fake_score, step.head, 1.0)
    result = term.at(step["generated"], step.batch, step["gan_gen.timestep"], step["gan_gen.noise"])
    assert relative_error(result.loss, step["gan_gen.loss"]) < 1e-5
    assert relative_error(result.gradient, step["gan_gen.grad_at_generated"]) < 1e-4
    assert all(p.grad is None for p in [*step.fake_score.parameters(), *step.head.parameters()])


def test_fake_score_and_discriminator(step: Step) -> None:
    condition = step.batch.condition
    denoising = FakeScoreDenoising(step.fake_score).at(
        step["generated"], condition, step["fake.timestep"], step["fake.noise"]
    )
    real = RealBatch(step["real_latents"], step.condition("real_text_embedding", "real_pooled"))
    adversarial = DiscriminatorAdversarial(step.fake_score, step.head, 0.01).at(
        step["generated"], condition, real,
        step["gan_disc.timestep_real"], step["gan_disc.noise_real"],
        step["gan_disc.timestep_generated"], step["gan_disc.noise_generated"],
    )  # fmt: skip
    assert relative_error(denoising, step["fake.loss"]) < 1e-5
    assert relative_error(adversarial, step["gan_disc.loss"]) < 1e-5


def test_network_is_called_as_diffusers_calls_it(step: Step) -> None:
    condition, level = step.batch.condition, step.batch.level
    added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]} if "pooled" in condition else None
    with torch.no_grad():
        theirs = step.teacher.network(step["noise"], level, condition["text"], added_cond_kwargs=added).sample
        ours, (feature,) = step.teacher.run_network(step["noise"], level, condition, "both")
        alone = step.teacher.features(step["noise"], level, condition)[0]
    assert ours is not None
    assert torch.equal(ours, theirs)
    assert torch.equal(feature, alone)
    assert alone.shape[1:] == step.teacher.feature_shapes[0]
