"""Tiny text-to-image generators, and diffusers pipelines fed with the noises that our sampler draws."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.samplers import sample_noise
from fewstep.export.export import ExportOptions, export_generator
from fewstep.families.registry import recognise
from fewstep.formats.kohya_lora import read_lora
from fewstep.formats.model_folder import ModelCard
from fewstep.models.load import load_generator, load_teacher
from fewstep.models.model import Model
from fewstep.networks.adapters import LoraShape, SharedBase
from tests.tiny_flow_models import (
    klein_latents,
    klein_tokens,
    tiny_flux2_klein_folder,
    tiny_qwen_image_folder,
    tiny_z_image_folder,
)
from tests.tiny_models import tiny_sd3_folder, tiny_sd_folder, tiny_sdxl_folder

FOLDERS: dict[str, Callable[[Path], Path]] = {
    "sd": tiny_sd_folder, "sdxl": tiny_sdxl_folder, "sd3": tiny_sd3_folder, "z-image": tiny_z_image_folder,
    "flux2-klein": tiny_flux2_klein_folder, "qwen-image": tiny_qwen_image_folder,
    "sd-v": partial(tiny_sd_folder, prediction_type="v_prediction"),
    "sdxl-v": partial(tiny_sdxl_folder, prediction_type="v_prediction"),
}  # fmt: skip
PROMPTS = ["red cat", "a dog"]
# how a pipeline takes noise (B, C, H, W) at the start, and how its scheduler sees it
PACKED = {"flux2-klein": (klein_latents, klein_tokens), "qwen-image": (klein_tokens, klein_tokens)}
FOUR = (999, 749, 499, 249)
EXACT = ExportOptions(precision="fp32", num_samples=0, device="cpu")


def moved(network: Denoiser, scale: float) -> Denoiser:
    """The network with other weights than its teacher's (a LoRA with other ones than zero)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return network


def write_run(
    folder: Path, family: str = "sd", steps: tuple[int, ...] = FOUR, lora: LoraShape | None = None, **card: Any
) -> Path:
    """A run folder around a generator as `fewstep train` writes it; its teacher lies beside it."""
    teacher = load_teacher(FOLDERS[family](folder / "teacher"), device="cpu")
    network = SharedBase(teacher.denoiser, lora).add_role("generator") if lora else teacher.denoiser
    sigmas = teacher.denoiser.noise_schedule.travelling(steps)
    facts = ModelCard(role="generator", step_indices=steps, step_sigmas=sigmas, **card)
    teacher.student(moved(network, 0.15 if lora else 0.03), facts).write(folder / "run/generator")
    return folder / "run"


def load(path: Path, **options: Any) -> Model:
    generator = load_generator(path, device="cpu", **options)
    return generator


def render(pipe: Any, generator: Model, seed: int, **options: Any) -> Tensor:
    """The pipeline's pictures (N, 3, H, W) in [-1, 1] from the noises that `generator.sample(seed=seed, output="tensor")` draws."""
    count = len(PROMPTS)
    noises = [
        sample_noise(generator.denoiser, seed, 0, count, torch.device("cpu"), step=step)
        for step in range(len(generator.card.step_indices) + 1)
    ]
    module = "scheduling_flow_match_lcm" if generator.card.step_sigmas else "scheduling_lcm"
    pipe.set_progress_bar_config(disable=True)
    first, later = PACKED.get(generator.family.name, (Tensor.clone, Tensor.clone))
    with mock.patch(f"diffusers.schedulers.{module}.randn_tensor", side_effect=[later(noise) for noise in noises[1:]]):
        images = pipe(prompt=list(PROMPTS), latents=first(noises[0]), output_type="pt", **options).images
    return images * 2 - 1


def open_pipeline(folder: Path, kind: type[DiffusionPipeline]) -> Any:
    """The folder's own pipeline, which must be of this kind."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipe, kind)
    return pipe


def pixels_of_the_export(
    tmp_path: Path, family: str, kind: type[DiffusionPipeline], call: dict[str, Any],
    steps: tuple[int, ...] = FOUR, lora: LoraShape | None = None,
) -> tuple[Path, Any]:  # fmt: skip
    """Export a generator and hold its pipeline, and the export without the teacher, to its pictures; (export, pipeline).

    Args:
        call: how the family's pipeline is told of a generator.
    """
    run = write_run(tmp_path, family, steps, lora)
    generator = load(run)
    expected = generator.sample(PROMPTS, seed=5, output="tensor")
    out = export_generator(run, tmp_path / "out", EXACT)
    pipe = open_pipeline(out, kind)
    assert (render(pipe, generator, 5, **call) - expected).abs().max() < 1e-4
    assert expected.std() > 0.02  # no empty pictures
    (tmp_path / "teacher").rename(tmp_path / "gone")
    assert (load(out).sample(PROMPTS, seed=5, output="tensor") - expected).abs().max() < 1e-4
    return out, pipe


def pixels_of_the_lora(file: Path, teacher: Path, generator: Model, seed: int) -> Tensor:
    """Pictures of a generator whose LoRA is read from a file, on its teacher."""
    base: Any = load_teacher(teacher, device="cpu").denoiser
    family, description = recognise(teacher), base.describe()
    lora = read_lora(file, [name for name, _ in base.named_modules()], partial(family.layer_aliases, description))
    role = SharedBase(base, LoraShape(lora.rank, lora.alpha, lora.targets)).add_role("generator")
    role.load_adapter_state(lora.state)
    generator.denoiser = role.eval()
    return generator.sample(PROMPTS, seed=seed, output="tensor")
