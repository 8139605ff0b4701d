"""Students of Qwen-Image in QwenImagePipeline itself: no timesteps typed, the pictures of `fewstep sample`."""

import json
from pathlib import Path

import pytest
from diffusers import FlowMatchLCMScheduler, QwenImagePipeline

import fewstep
from fewstep.errors import UserError
from fewstep.export.export import ExportOptions, export_generator
from fewstep.networks.adapters import LoraShape
from tests.export.text_generators import (
    EXACT,
    PROMPTS,
    load,
    open_pipeline,
    pixels_of_the_export,
    pixels_of_the_lora,
    render,
    write_run,
)

CALL = {"num_inference_steps": 4, "true_cfg_scale": 1, "height": 16, "width": 16}


@pytest.mark.parametrize("lora", [None, pytest.param(LoraShape(4, 2.0), marks=pytest.mark.long)])
def test_the_pipeline_makes_our_pixels(tmp_path: Path, lora: LoraShape | None) -> None:
    out, pipe = pixels_of_the_export(tmp_path, "qwen-image", QwenImagePipeline, CALL, lora=lora)
    for number in (2, 8):
        with pytest.raises(ValueError, match="should have the same length"):
            pipe(prompt="cat", **{**CALL, "num_inference_steps": number})
    scheduler = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert scheduler["use_dynamic_shifting"] is False
    card = (out / "README.md").read_text()
    assert "num_inference_steps=4, true_cfg_scale=1, height=16, width=16).images" in card


@pytest.mark.slow
def test_load_pipeline_needs_a_prompt_only(tmp_path: Path) -> None:
    run = write_run(tmp_path, "qwen-image")
    pipe, generator = fewstep.load_pipeline(export_generator(run, tmp_path / "out", EXACT)), load(run)
    expected = generator.sample(PROMPTS, seed=2, output="tensor")
    assert (render(pipe, generator, 2) - expected).abs().max() < 1e-4
    for options in ({"true_cfg_scale": 4.0}, {"negative_prompt": "blurred"}):
        with pytest.raises(UserError, match="has its guidance built in"):
            pipe("cat", **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.long), "kohya-lora"])
def test_loras_make_our_pixels_in_diffusers_and_come_back(tmp_path: Path, kind: str) -> None:
    """kohya's keys through diffusers' own converter."""
    run = write_run(tmp_path, "qwen-image", lora=LoraShape(4, 1.0))  # a wrong scale would be a factor of 4
    generator = load(run)
    expected = generator.sample(PROMPTS, seed=3, output="tensor")
    out = export_generator(run, tmp_path / "out", ExportOptions(kind=kind, precision="fp32", num_samples=0))
    (file,) = out.glob("*.safetensors")
    pipe = open_pipeline(tmp_path / "teacher", QwenImagePipeline)
    pipe.scheduler = FlowMatchLCMScheduler.from_pretrained(out, subfolder="scheduler")
    without = render(pipe, generator, 3, **CALL)
    pipe.load_lora_weights(out, weight_name=file.name)
    assert (render(pipe, generator, 3, **CALL) - expected).abs().max() < 1e-4
    assert (without - expected).abs().max() > 5e-3
    assert (pixels_of_the_lora(file, tmp_path / "teacher", generator, 3) - expected).abs().max() < 1e-4
    card = (out / "README.md").read_text()
    assert ("**For diffusers and ComfyUI**" if kind == "lora" else "for it, export `--as lora`") in card


def test_a_single_file_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, "qwen-image")
    with pytest.raises(UserError, match=r"qwen-image keeps its transformer under other keys"):
        export_generator(run, tmp_path / "out", ExportOptions(kind="single-file", num_samples=0))
    assert not (tmp_path / "out").exists()
