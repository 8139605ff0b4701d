"""CONTRIBUTING's two worked recipes, followed: a family is one folder and one line, a loss is one term and one `if`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
import fewstep.families
from fewstep.distillation.inputs import GeneratorInput
from fewstep.distillation.terms import TermResult
from fewstep.families import registry
from fewstep.formats.model_folder import ModelCard, write_model_folder
from fewstep.training import build
from tests.training.helpers import tiny_train_settings

DENOISER = '''
"""A family that nobody needs: a flow on straight paths over pixels, two convolutions."""

import torch
from torch import nn

from fewstep.diffusion.denoiser import Denoiser, DenoiserOutput, network_input, plain_checkpoint
from fewstep.diffusion.per_sample import per_sample
from fewstep.diffusion.schedules import FlowSchedule


class ToyDenoiser(Denoiser):
    def __init__(self, side, num_classes):
        super().__init__()
        self.inner = nn.Conv2d(1, 16, 3, padding=1)
        self.labels = nn.Linear(num_classes, 16)
        self.outer = nn.Conv2d(16, 1, 3, padding=1)
        self.noise_schedule, self.num_classes, self.compute_dtype = FlowSchedule(2.0), num_classes, torch.float32
        self.image_shape, self.tap_shapes, self.middle = (1, side, side), ((16, side, side),), 0
        self.recompute = None

    def forward(self, noisy, level, condition, want="x0"):
        block = self.recompute if self.recompute and torch.is_grad_enabled() else lambda block, x: block(x)
        feature = block(self.inner, network_input(self, noisy)) + self.labels(condition["class_labels"])[:, :, None, None]
        if want == "features":
            return DenoiserOutput(None, (feature,))
        velocity = block(self.outer, torch.tanh(feature))
        x0 = noisy - per_sample(self.noise_schedule.sigma(level), noisy) * velocity
        return DenoiserOutput(x0, (feature,) if want == "both" else None)

    def denoising_weight(self, level):
        return self.noise_schedule.sigma(level) ** -2

    def blocks(self):
        return [self.inner, self.outer]

    def checkpoint_activations(self, checkpoint=None):
        self.recompute = checkpoint or plain_checkpoint

    def describe(self):
        return {"family": "toy", "side": self.image_shape[1], "num_classes": self.num_classes}
'''
FAMILY = '''
"""The Family object of the toy."""

import json

import torch

from fewstep.diffusion.condition import ClassTable
from fewstep.diffusion.samplers import sample_ddim
from fewstep.families.family import Family
from fewstep.families.toy.denoiser import ToyDenoiser
from fewstep.formats.model_folder import CONFIG, read_card, read_model_folder


class Toy(Family):
    name, title, takes = "toy", "toys", "labels"
    sampler_name, default_num_steps, default_batch_size = "Euler", 6, 8

    def recognise(self, folder):
        path = folder / CONFIG
        return path.is_file() and json.loads(path.read_text()).get("description", {}).get("family") == "toy"

    def describes(self, description):
        return description.get("family") == "toy"

    def build(self, description):
        return ToyDenoiser(description["side"], description["num_classes"])

    def load(self, folder, resolution=0):
        description, weights, _ = read_model_folder(folder)
        denoiser = self.build(description)
        denoiser.load_state_dict(weights)
        return denoiser

    def describe_folder(self, folder, resolution=0):
        return read_card(folder)[0]

    def resolution(self, folder):
        return self.describe_folder(folder)["side"]

    def read_card(self, folder):
        return read_card(folder)[1]

    def evaluations(self, num_steps):
        return num_steps

    def sample(self, denoiser, noise, condition, *, num_steps, guidance_scale):
        return sample_ddim(denoiser, noise, condition, num_steps=num_steps, guidance_scale=guidance_scale)

    def refuse_guidance(self, denoiser, card, guidance_scale):
        return None

    def example_condition(self, denoiser, size):
        return ClassTable(denoiser.num_classes).rows(torch.zeros(size, dtype=torch.int64))
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher of a family that lies outside of src: its folder beside the others', its line in the registry."""
    folder = tmp_path / "families/toy"
    folder.mkdir(parents=True)
    for name, text in (("__init__", '"""Toys."""'), ("denoiser", DENOISER), ("family", FAMILY)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(fewstep.families, "__path__", [*fewstep.families.__path__, str(tmp_path / "families")])
    monkeypatch.setitem(registry.FAMILIES, "toy", "toy.family:Toy")
    torch.manual_seed(0)
    denoiser = registry.family_named("toy").build({"side": 16, "num_classes": 4})
    card = ModelCard(role="teacher", class_names=tuple(f"class{number}" for number in range(4)))
    write_model_folder(tmp_path / "teacher", denoiser.describe(), denoiser.state_dict(), card)
    yield tmp_path / "teacher"
    registry.family_named.cache_clear()
    for name in [name for name in sys.modules if name.startswith("fewstep.families.toy")]:
        del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [[999], [999, 499]])
def test_a_family_is_one_folder_and_one_line(toy: Path, pictures: Path, tmp_path: Path, steps: list[int]) -> None:
    """Trained with GAN and recomputed activations through the unchanged trainer, written, loaded, sampled."""
    teacher = fewstep.load_teacher(toy)
    assert teacher.sample(4, output="tensor", progress=False).shape == (4, 1, 16, 16)
    settings = tiny_train_settings(
        toy, pictures, tmp_path / "run", generator={"step_indices": steps}, memory={"checkpoint_activations": True}
    )
    run = fewstep.train(settings)
    losses = [row["fake_score_loss"] for row in run.metrics if "fake_score_loss" in row]
    assert len(losses) == 6
    assert all(loss > 0 for loss in losses)
    images = fewstep.load_generator(tmp_path / "run").sample(labels=[0, 1], output="tensor", progress=False)
    assert torch.equal(images, run.generator.sample(labels=[0, 1], output="tensor", progress=False))


@pytest.mark.slow
@dataclass
class Colour:
    """Bring the mean of every picture near a grey."""

    weight: float
    name: str = "colour"

    def __call__(self, x0: Tensor, batch: GeneratorInput, draws: Any) -> TermResult:
        mean = x0.flatten(1).mean(1)
        gradient = (2 * (mean - 0.1) / x0[0].numel() / len(x0))[:, None, None, None].expand_as(x0)
        return TermResult((mean - 0.1).square().mean(), gradient)


def test_a_loss_is_one_term_and_one_if(
    teacher_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss, its gradient's norm and the ratio to distribution matching then appear by themselves."""
    terms_of = build._build_generator_terms
    monkeypatch.setattr(build, "_build_generator_terms", lambda *given: [*terms_of(*given), Colour(3.0)])
    run = fewstep.train(tiny_train_settings(teacher_folder, pictures, tmp_path / "run"))
    rows = [row for row in run.metrics if "colour_loss" in row]
    assert len(rows) == 3  # every second of six steps is the generator's turn
    assert all(row["colour_norm_at_x0"] > 0 and "colour_norm_ratio" in row for row in rows)
    plain = fewstep.train(tiny_train_settings(teacher_folder, pictures, tmp_path / "plain"))
    assert rows[-1]["fake_score_loss"] != plain.metrics[4]["fake_score_loss"]
