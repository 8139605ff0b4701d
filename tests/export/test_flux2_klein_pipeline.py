"""Students of FLUX.2 klein in Flux2KleinPipeline itself: no timesteps typed, the pictures of `fewstep sample`."""

import json
from pathlib import Path

import pytest
from diffusers import FlowMatchLCMScheduler, Flux2KleinPipeline

import fewstep
from fewstep.errors import UserError
from fewstep.export.export import ExportOptions, export_generator
from fewstep.families.registry import recognise
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

CALL = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 16, "width": 16}


@pytest.mark.parametrize("lora", [None, pytest.param(LoraShape(4, 2.0), marks=pytest.mark.long)])
def test_the_pipeline_makes_our_pixels(tmp_path: Path, lora: LoraShape | None) -> None:
    out, pipe = pixels_of_the_export(tmp_path, "flux2-klein", Flux2KleinPipeline, CALL, lora=lora)
    for number in (2, 8):
        with pytest.raises(ValueError, match="should have the same length"):
            pipe(prompt="cat", **{**CALL, "num_inference_steps": number})
    scheduler = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert scheduler["use_dynamic_shifting"] is False


@pytest.mark.slow
def test_load_pipeline_needs_a_prompt_only(tmp_path: Path) -> None:
    run = write_run(tmp_path, "flux2-klein")
    pipe, generator = fewstep.load_pipeline(export_generator(run, tmp_path / "out", EXACT)), load(run)
    expected = generator.sample(PROMPTS, seed=2, output="tensor")
    assert (render(pipe, generator, 2) - expected).abs().max() < 1e-4
    with pytest.raises(UserError, match="has its guidance built in"):
        pipe("cat", guidance_scale=4.0)


def test_its_pipeline_leaves_guidance_out_unasked(tmp_path: Path) -> None:
    """guidance_scale is 4 unless typed; it is a generator by its scheduler, no release that would have to be refused."""
    run = write_run(tmp_path, "flux2-klein")
    out, generator = export_generator(run, tmp_path / "out", EXACT), load(run)
    unasked = {name: value for name, value in CALL.items() if name != "guidance_scale"}
    expected = generator.sample(PROMPTS, seed=2, output="tensor")
    pipe = open_pipeline(out, Flux2KleinPipeline)
    assert (render(pipe, generator, 2, **unasked) - expected).abs().max() < 1e-4
    family = recognise(out)
    family.refuse_as_teacher(out)
    assert not family.read_card(out).can_be_guided


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "kohya-lora"])
def test_loras_make_our_pixels_in_diffusers_and_come_back(tmp_path: Path, kind: str) -> None:
    run = write_run(tmp_path, "flux2-klein", lora=LoraShape(4, 1.0))  # a wrong scale would be a factor of 4
    generator = load(run)
    expected = generator.sample(PROMPTS, seed=3, output="tensor")
    out = export_generator(run, tmp_path / "out", ExportOptions(kind=kind, precision="fp32", num_samples=0))
    (file,) = out.glob("*.safetensors")
    pipe = open_pipeline(tmp_path / "teacher", Flux2KleinPipeline)
    pipe.scheduler = FlowMatchLCMScheduler.from_pretrained(out, subfolder="scheduler")
    without = render(pipe, generator, 3, **CALL)
    pipe.load_lora_weights(out, weight_name=file.name)
    assert (render(pipe, generator, 3, **CALL) - expected).abs().max() < 1e-4
    assert (without - expected).abs().max() > 5e-3
    assert (pixels_of_the_lora(file, tmp_path / "teacher", generator, 3) - expected).abs().max() < 1e-4
    card = (out / "README.md").read_text()
    assert ("For ComfyUI, kohya's tools" in card) == (kind == "kohya-lora")
    assert not (out / "comfyui_workflow.json").exists()  # none can say its levels


def test_files_that_nobody_reads_are_refused(tmp_path: Path) -> None:
    kind = "single-file"
    run = write_run(tmp_path, "flux2-klein", lora=LoraShape(4, 1.0))
    with pytest.raises(UserError, match="export"):
        export_generator(run, tmp_path / "out", ExportOptions(kind=kind, num_samples=0))
    assert not (tmp_path / "out").exists()
