"""ComfyUI workflows, run here by a small interpreter of what ComfyUI's documentation says of each node.

ComfyUI itself is not available to these tests: what they prove is that a program with these rules makes the picture of
`fewstep sample` from the same noises, not that ComfyUI has these rules.
"""

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.samplers import sample_few_steps, sample_noise
from fewstep.diffusion.schedules import DiscreteSchedule
from fewstep.errors import UserError
from fewstep.export.comfyui import Graph, build_workflow, plan_workflow, write_workflow
from fewstep.export.lora import base_denoiser
from fewstep.models.model import Model
from tests.export.single_file_models import FOLDERS, load_generator
from tests.tiny_models import tiny_sd_folder

PROMPT = "red cat"
# inputs of the stock nodes that are used, and how many outputs they have (docs.comfy.org/built-in-nodes)
NODES: dict[str, tuple[set[str], int]] = {
    "CheckpointLoaderSimple": ({"ckpt_name"}, 3),
    "LoraLoaderModelOnly": ({"model", "lora_name", "strength_model"}, 1),
    "ModelSamplingDiscrete": ({"model", "sampling", "zsnr"}, 1),
    "CLIPTextEncode": ({"clip", "text"}, 1),
    "EmptyLatentImage": ({"width", "height", "batch_size"}, 1),
    "ManualSigmas": ({"sigmas"}, 1),
    "RandomNoise": ({"noise_seed"}, 1),
    "AddNoise": ({"model", "noise", "sigmas", "latent_image"}, 1),
    "KSamplerSelect": ({"sampler_name"}, 1),
    "SamplerCustom": (
        {"model", "add_noise", "noise_seed", "cfg", "positive", "negative", "sampler", "sigmas", "latent_image"}, 2,
    ),
    "VAEDecode": ({"samples", "vae"}, 1),
    "SaveImage": ({"images", "filename_prefix"}, 0),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(FOLDERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FOLDERS[request.param](tmp_path_factory.mktemp("models") / request.param)


class Interpreter:
    """Runs the latent part of a workflow in the variance-exploding picture that ComfyUI keeps.

    Args:
        generator: what the graph's checkpoint is.
        noises: number of the step -> unit noise, which ComfyUI would draw from the seed.
    """

    def __init__(self, generator: Model, noises: Callable[[int], Tensor]) -> None:
        self.base, self.noises = base_denoiser(generator), noises
        schedule = self.base.noise_schedule
        assert isinstance(schedule, DiscreteSchedule)
        grid = torch.arange(schedule.num_levels)
        self.levels = (schedule.sigma64(grid) / schedule.alpha64(grid)).float()  # rising
        self.generator, self.prediction = generator, "eps"

    def run(self, graph: Graph) -> Tensor:
        """The latent that the graph decodes."""
        self.graph = graph
        decoder = next(node for node in graph.values() if node["class_type"] == "VAEDecode")
        return self.value(decoder["inputs"]["samples"])

    def value(self, link: list[Any]) -> Any:
        node = self.graph[link[0]]
        inputs = {k: self.value(v) if isinstance(v, list) else v for k, v in node["inputs"].items()}
        return getattr(self, node["class_type"])(link[1], **inputs)

    def CheckpointLoaderSimple(self, output: int, ckpt_name: str) -> str:
        return ("model", "clip", "vae")[output]

    def LoraLoaderModelOnly(self, output: int, model: str, lora_name: str, strength_model: float) -> str:
        assert strength_model == 1
        return model

    def ModelSamplingDiscrete(self, output: int, model: str, sampling: str, zsnr: bool) -> str:
        self.prediction = sampling
        return model

    def CLIPTextEncode(self, output: int, clip: str, text: str) -> Any:
        table = self.generator.conditioner.table([text], self.generator.size)
        return table.rows(torch.tensor([0]))

    def EmptyLatentImage(self, output: int, width: int, height: int, batch_size: int) -> Tensor:
        assert (height, width) == self.generator.size
        return torch.zeros(batch_size, *self.base.image_shape)

    def ManualSigmas(self, output: int, sigmas: str) -> Tensor:
        return torch.tensor([float(number) for number in re.findall(r"[-+]?\d*\.?\d+", sigmas)])

    def RandomNoise(self, output: int, noise_seed: int) -> Tensor:
        return self.noises(0)

    def AddNoise(self, output: int, model: str, noise: Tensor, sigmas: Tensor, latent_image: Tensor) -> Tensor:
        strength = (sigmas[0] - sigmas[-1]).abs() if len(sigmas) > 1 else sigmas[0]
        return latent_image + strength * noise

    def KSamplerSelect(self, output: int, sampler_name: str) -> str:
        return sampler_name

    def SamplerCustom(
        self, output: int, model: str, add_noise: bool, noise_seed: int, cfg: float, positive: Any, negative: Any,
        sampler: str, sigmas: Tensor, latent_image: Tensor,
    ) -> Tensor:  # fmt: skip
        assert (sampler, cfg, output) == ("lcm", 1.0, 0)
        noise = self.noises(0) if add_noise else torch.zeros_like(latent_image)
        is_last = math.isclose(float(sigmas[0]), float(self.levels[-1]), rel_tol=1e-5)
        x = latent_image + noise * (torch.sqrt(1 + sigmas[0] ** 2) if is_last else sigmas[0])
        for number, (sigma, after) in enumerate(itertools.pairwise(sigmas), start=1):
            x = self.x0(x, sigma, positive)
            if after > 0:
                x = x + after * self.noises(number)
        return x

    def x0(self, x: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        """x0 from the network at the timestep whose level is nearest, in the model's own scale."""
        step = (sigma.log() - self.levels.log()).abs().argmin()
        scale = torch.sqrt(sigma**2 + 1)
        raw, _ = self.base.run_network(x / scale, step.expand(len(x)), condition, "x0")
        assert raw is not None
        if self.prediction == "v_prediction":
            return x / scale**2 - raw * sigma / scale
        return x - raw * sigma


@pytest.mark.parametrize("steps", [(999, 749, 499, 249), (999,), (399,), (599, 199)], ids=str)
@torch.no_grad()
def test_the_graph_makes_the_generators_picture(folder: Path, steps: tuple[int, ...]) -> None:
    generator = load_generator(folder, *steps)

    def noises(number: int) -> Tensor:
        return sample_noise(generator.denoiser, 3, 0, 1, torch.device("cpu"), step=number)

    graph = build_workflow(plan_workflow(generator), "model.safetensors", prompt=PROMPT, seed=3)
    theirs = Interpreter(generator, noises).run(graph)
    table = generator.conditioner.table([PROMPT], generator.size)
    condition = table.rows(torch.tensor([0]))
    ours = sample_few_steps(generator.denoiser, noises(0), condition, generator.step_schedule, noises)
    assert (ours - theirs).abs().max() < 1e-3 * ours.abs().max()


@torch.no_grad()
def test_v_prediction_has_its_node(tmp_path: Path) -> None:
    generator = load_generator(tiny_sd_folder(tmp_path / "v", prediction_type="v_prediction"), 999, 499)

    def noises(number: int) -> Tensor:
        return sample_noise(generator.denoiser, 3, 0, 1, torch.device("cpu"), step=number)

    graph = build_workflow(plan_workflow(generator), "model.safetensors", prompt=PROMPT)
    theirs = Interpreter(generator, noises).run(graph)
    condition = generator.conditioner.table([PROMPT], generator.size).rows(torch.tensor([0]))
    ours = sample_few_steps(generator.denoiser, noises(0), condition, generator.step_schedule, noises)
    assert (ours - theirs).abs().max() < 1e-3 * ours.abs().max()


@pytest.mark.parametrize("lora", ["", "lora.safetensors"])
@pytest.mark.parametrize("steps", [(999, 749, 499, 249), (399,)], ids=str)
def test_nodes_inputs_and_links_exist(folder: Path, steps: tuple[int, ...], lora: str, tmp_path: Path) -> None:
    generator = load_generator(folder, *steps)
    out = write_workflow(
        generator, tmp_path / "new" / "flow.json", "model.safetensors", lora=lora, prompt=PROMPT, seed=7
    )
    graph = json.loads(out.read_text(encoding="utf-8"))
    for node in graph.values():
        inputs, _ = NODES[node["class_type"]]
        assert set(node["inputs"]) == inputs
        for value in node["inputs"].values():
            if isinstance(value, list):
                source, output = value
                assert isinstance(source, str)
                assert output < NODES[graph[source]["class_type"]][1]
    kinds = [node["class_type"] for node in graph.values()]
    assert ("LoraLoaderModelOnly" in kinds) == bool(lora)
    assert ("AddNoise" in kinds) == (steps[0] != 999)
    sampler = next(node["inputs"] for node in graph.values() if node["class_type"] == "SamplerCustom")
    assert sampler["noise_seed"] == 7
    if lora:
        assert graph[sampler["model"][0]]["class_type"] == "LoraLoaderModelOnly"


def test_levels_are_decimals_that_hold_float32(folder: Path) -> None:
    """No exponents, and the first one close enough to the model's last level to count as it."""
    plan = plan_workflow(load_generator(folder, 999, 749, 499, 249))
    graph = build_workflow(plan, "model.safetensors")
    text = next(node["inputs"]["sigmas"] for node in graph.values() if node["class_type"] == "ManualSigmas")
    assert re.fullmatch(r"\d+\.\d{9}(, \d+\.\d{9}){3}, 0\.0{9}", text)
    numbers = torch.tensor([float(number) for number in text.split(", ")])
    assert torch.equal(numbers[:-1], torch.tensor(plan.sigmas))
    assert float(numbers[0]) == pytest.approx(14.6146, abs=1e-4)


def test_what_is_refused(tmp_path: Path) -> None:
    folder = tiny_sd_folder(tmp_path / "zero", prediction_type="v_prediction")
    config = folder / "scheduler/scheduler_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**values, "rescale_betas_zero_snr": True}), encoding="utf-8")
    with pytest.raises(UserError, match="noise level is infinite"):
        plan_workflow(load_generator(folder, 999, 499))
    taken = tmp_path / "taken.json"
    taken.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        write_workflow(load_generator(folder, 499), taken, "model.safetensors")
    with pytest.raises(UserError, match="cannot write"):
        write_workflow(load_generator(folder, 499), taken / "flow.json", "model.safetensors")
    assert taken.read_text(encoding="utf-8") == "mine"
