"""Students of Z-Image in ZImagePipeline itself: no timesteps typed, the pictures of `fewstep sample`."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchLCMScheduler, ZImagePipeline
from safetensors.torch import load_file

import fewstep
from fewstep.errors import UserError
from fewstep.export.export import ExportOptions, export_generator
from fewstep.networks.adapters import LoraShape
from tests.export.text_generators import (
    EXACT,
    FOUR,
    PROMPTS,
    load,
    open_pipeline,
    pixels_of_the_export,
    pixels_of_the_lora,
    render,
    write_run,
)


@pytest.mark.parametrize(
    ("steps", "lora"), [(FOUR, None), (FOUR, LoraShape(4, 2.0)), pytest.param((999,), None, marks=pytest.mark.long)]
)
def test_the_pipeline_makes_our_pixels(tmp_path: Path, steps: tuple[int, ...], lora: LoraShape | None) -> None:
    call = {"num_inference_steps": len(steps), "guidance_scale": 0.0, "height": 16, "width": 16}
    pixels_of_the_export(tmp_path, "z-image", ZImagePipeline, call, steps, lora)


def test_load_pipeline_needs_a_prompt_only(tmp_path: Path) -> None:
    """ZImagePipeline's own pictures are 1024 pixels wide and guided, unless told; ours knows the generator's."""
    run = write_run(tmp_path, "z-image")
    pipe, generator = fewstep.load_pipeline(export_generator(run, tmp_path / "out", EXACT)), load(run)
    expected = generator.sample(PROMPTS, seed=2, output="tensor")
    assert (render(pipe, generator, 2) - expected).abs().max() < 1e-4
    for scale in (5.0, 1.5):
        with pytest.raises(UserError, match="has its guidance built in"):
            pipe("cat", guidance_scale=scale)
    with pytest.raises(UserError, match="num_inference_steps=8: this generator makes a picture in 4"):
        pipe("cat", num_inference_steps=8)


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.long), "kohya-lora"])
def test_loras_make_our_pixels_in_diffusers_and_come_back(tmp_path: Path, kind: str) -> None:
    """kohya's keys through diffusers' own converter."""
    run = write_run(tmp_path, "z-image", lora=LoraShape(4, 1.0))  # a wrong scale would be a factor of 4
    generator = load(run)
    expected = generator.sample(PROMPTS, seed=3, output="tensor")
    out = export_generator(run, tmp_path / "out", ExportOptions(kind=kind, precision="fp32", num_samples=0))
    (file,) = out.glob("*.safetensors")
    pipe = open_pipeline(tmp_path / "teacher", ZImagePipeline)
    without = render(pipe, generator, 3, num_inference_steps=4, **generator.family.pipeline_options(generator.size))
    pipe.load_lora_weights(out, weight_name=file.name)
    pipe.scheduler = FlowMatchLCMScheduler.from_pretrained(out, subfolder="scheduler")
    made = render(pipe, generator, 3, num_inference_steps=4, **generator.family.pipeline_options(generator.size))
    assert (made - expected).abs().max() < 1e-3
    assert (without - expected).abs().max() > 0.05
    assert (pixels_of_the_lora(file, tmp_path / "teacher", generator, 3) - expected).abs().max() < 1e-4
    card = (out / "README.md").read_text()
    assert "num_inference_steps=4, guidance_scale=0, height=16, width=16).images" in card
    assert '("cuda", torch.bfloat16)' in card
    assert ("**For diffusers and ComfyUI**" if kind == "lora" else "for it, export `--as lora`") in card


def test_a_single_file_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, "z-image")
    with pytest.raises(
        UserError, match=r"z-image keeps its transformer under other keys.*export it as a diffusers folder"
    ):
        export_generator(run, tmp_path / "out", ExportOptions(kind="single-file", num_samples=0))
    assert not (tmp_path / "out").exists()


def test_another_number_of_steps_is_the_schedulers_own_error(tmp_path: Path) -> None:
    """Of one step nothing can be said: FlowMatchLCMScheduler has no factors to count."""
    pipe = open_pipeline(export_generator(write_run(tmp_path, "z-image"), tmp_path / "out", EXACT), ZImagePipeline)
    pipe.set_progress_bar_config(disable=True)
    for number in (2, 8):
        with pytest.raises(ValueError, match="should have the same length"):
            pipe("cat", num_inference_steps=number, guidance_scale=0.0, height=16, width=16)


def test_levels_travel_where_the_bases_scheduler_is_another_one(tmp_path: Path) -> None:
    """The base is given by name; a scheduler that was edited since does not move the generator's steps."""
    run = write_run(tmp_path, "z-image", lora=LoraShape(4, 2.0))
    card = json.loads((run / "generator/fewstep.json").read_text())
    assert card["step_sigmas"] == pytest.approx([1.0, 0.9, 0.75, 0.5])
    expected = load(run).sample(PROMPTS, seed=5, output="tensor")
    config = tmp_path / "teacher/scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace('"shift": 3.0', '"shift": 6.0'))
    assert torch.equal(load(run).sample(PROMPTS, seed=5, output="tensor"), expected)
    out = export_generator(run, tmp_path / "out", EXACT)
    scheduler = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert scheduler["shift"] == pytest.approx(3)
    assert scheduler["use_dynamic_shifting"] is False


def test_the_exported_network_is_the_pipelines_own(tmp_path: Path) -> None:
    run = write_run(tmp_path, "z-image")
    out = export_generator(run, tmp_path / "out", ExportOptions(kind="unet", precision="fp32", num_samples=0))
    config = json.loads((out / "transformer/config.json").read_text())
    assert config["_class_name"] == "ZImageTransformer2DModel"
    assert "sample_size" not in config  # the class has none
    assert (
        load_file(out / "transformer/diffusion_pytorch_model.safetensors").keys()
        == load(run).denoiser.own_weights().keys()
    )
