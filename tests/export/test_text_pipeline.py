"""Exported pipelines in diffusers itself: the pictures of `fewstep sample`, with no timesteps typed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    LCMScheduler,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.errors import UserError
from fewstep.export.export import ExportOptions, export_generator
from fewstep.export.text_pipeline import TextPipeline, absent_components
from fewstep.networks.adapters import LoraShape
from tests.export.text_generators import FOUR, PROMPTS, load, render, write_run

EXACT = ExportOptions(precision="fp32", num_samples=0, device="cpu")


def open_pipeline(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent_components(folder)))


@pytest.mark.parametrize(
    ("family", "steps", "lora"),
    [
        ("sd", (399,), LoraShape(4, 2.0)), ("sdxl", FOUR, LoraShape(4, 2.0)), ("sd-v", FOUR, None), ("sd3", FOUR, None),
        *(pytest.param(*triple, marks=pytest.mark.long) for triple in [
            ("sd", FOUR, None), ("sdxl", (399,), None), ("sdxl-v", (999,), None), ("sd3", (999,), None),
        ]),
    ],
)  # fmt: skip
def test_diffusers_makes_our_pixels(
    tmp_path: Path, family: str, steps: tuple[int, ...], lora: LoraShape | None
) -> None:
    """Nothing typed but the number of steps; then with the timesteps typed, too; the export loads here as well."""
    run = write_run(tmp_path, family, steps, lora)
    generator = load(run)
    expected = generator.sample(PROMPTS, seed=5, output="tensor")
    out = export_generator(run, tmp_path / "out", EXACT)
    pipe = open_pipeline(out)
    options = {"num_inference_steps": len(steps), "guidance_scale": 1}
    assert (render(pipe, generator, 5, **options) - expected).abs().max() < 1e-3
    if family != "sd3":
        typed = render(pipe, generator, 5, **options, timesteps=list(steps))
        assert (typed - expected).abs().max() < 1e-3
    (tmp_path / "teacher").rename(tmp_path / "gone")
    assert (load(out).sample(PROMPTS, seed=5, output="tensor") - expected).abs().max() < 1e-3
    assert expected.std() > 0.02  # no empty pictures


def test_text_encoders_have_published_names(tmp_path: Path) -> None:
    """transformers 5 saves them without `text_model.`; transformers 4 would read such an export at random values."""
    run = write_run(tmp_path, "sdxl")
    expected = load(run).sample(PROMPTS, seed=5, output="tensor")
    file = tmp_path / "teacher/text_encoder/model.safetensors"
    short = {name.removeprefix("text_model."): value for name, value in load_file(file).items()}
    save_file(short, file, metadata={"format": "pt"})
    assert (load(run).sample(PROMPTS, seed=5, output="tensor") - expected).abs().max() < 1e-6
    out = export_generator(run, tmp_path / "out", EXACT)
    assert all(name.startswith("text_model.") for name in load_file(out / "text_encoder/model.safetensors"))
    pipe = open_pipeline(out)
    made = render(pipe, load(run), 5, num_inference_steps=4, guidance_scale=1)
    assert (made - expected).abs().max() < 1e-3


def test_a_wrong_number_of_steps_in_the_pipeline(tmp_path: Path) -> None:
    pipe = open_pipeline(export_generator(write_run(tmp_path, "sdxl"), tmp_path / "out", EXACT))
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="is smaller than `num_inference_steps`"):
        pipe("cat", guidance_scale=1)  # the pipeline's own default is 50
    with pytest.raises(ValueError, match="is smaller than `num_inference_steps`"):
        pipe("cat", num_inference_steps=8, guidance_scale=1)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_load_pipeline_needs_a_prompt_only(tmp_path: Path, family: str) -> None:
    run = write_run(tmp_path, family)
    out, generator = export_generator(run, tmp_path / "out", EXACT), load(run)
    pipe = fewstep.load_pipeline(out)
    assert isinstance(pipe, TextPipeline)
    pipe.pipe.set_progress_bar_config(disable=True)
    assert pipe("a red cat").images[0].size == (16, 16)
    assert (render(pipe, generator, 2) - generator.sample(PROMPTS, seed=2, output="tensor")).abs().max() < 1e-3
    assert pipe.to("cpu") is pipe
    assert pipe.vae is pipe.pipe.vae
    with pytest.raises(UserError, match="num_inference_steps=8: this generator makes a picture in 4; leave it out"):
        pipe("cat", num_inference_steps=8)
    for options in ({"guidance_scale": 5.0}, {"negative_prompt": "dog"}):
        with pytest.raises(UserError, match="has its guidance built in"):
            pipe("cat", **options)
    with pytest.raises(AttributeError):
        copy.copy(pipe).nothing  # noqa: B018


def test_load_pipeline_of_a_run_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no pipeline yet: make one with fewstep export .* --as diffusers"):
        fewstep.load_pipeline(write_run(tmp_path))


@pytest.mark.parametrize("damage", ["fewstep.json", "unet/diffusion_pytorch_model.safetensors"])
def test_a_damaged_export_is_one_sentence(tmp_path: Path, damage: str) -> None:
    out = export_generator(write_run(tmp_path), tmp_path / "out", EXACT)
    if damage.endswith(".json"):
        (out / damage).write_text('{"description": {}}')
    else:
        (out / damage).write_bytes(b"xx")
    with pytest.raises(UserError, match="export it again"):
        fewstep.load_pipeline(out)


@pytest.mark.parametrize(("family", "steps"), [("sd", FOUR), ("sdxl", FOUR), ("sdxl", (399,)), ("sd3", FOUR)])
def test_image_to_image(tmp_path: Path, family: str, steps: tuple[int, ...]) -> None:
    pipe = open_pipeline(export_generator(write_run(tmp_path, family, steps), tmp_path / "out", EXACT))
    start = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": len(steps), "guidance_scale": 1, "output_type": "pt"}
    repaint = AutoPipelineForImage2Image.from_pipe(pipe)
    repaint.set_progress_bar_config(disable=True)
    full = repaint("cat", image=start, strength=1.0, **options).images
    assert full.shape == (1, 3, 16, 16)
    assert torch.isfinite(full).all()
    if len(steps) > 1:
        half = repaint("cat", image=start, strength=0.5, **options).images
        assert torch.isfinite(half).all()
        trained = pipe.scheduler.timesteps if family == "sd3" else set(repaint.scheduler.timesteps.tolist())
        assert family == "sd3" or trained <= set(steps)


def test_fp16_is_the_default_and_every_component_has_it(tmp_path: Path) -> None:
    run = write_run(tmp_path, "sdxl", made_with={"settings": {"run": {"name": "x"}}, "num_steps": 7}, licence="mit")
    out = export_generator(run, tmp_path / "out", ExportOptions(num_samples=0, device="cpu"))
    for path in out.rglob("*.safetensors"):
        assert {value.dtype for value in load_file(path).values() if value.is_floating_point()} == {torch.float16}
    with safe_open(out / "unet/diffusion_pytorch_model.safetensors", "pt") as file:
        header = file.metadata()
    assert json.loads(header["step_indices"]) == list(FOUR)
    assert header["base_model"] == str(tmp_path / "teacher")
    assert json.loads(header["recipe"]) == {"run": {"name": "x"}}
    assert (header["fewstep"], header["licence"], header["num_steps"]) == (fewstep.__version__, "mit", "7")
    pipe = open_pipeline(out)
    pipe.set_progress_bar_config(disable=True)
    made = pipe("red cat", num_inference_steps=4, guidance_scale=1, output_type="pt").images
    assert torch.isfinite(made).all()
    assert not list(out.rglob("*.bin"))


def test_infinities_in_fp16_are_refused_by_name(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    path = run / "generator/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.weight"][0, 0, 0, 0] = 1e6
    save_file(tensors, path)
    with pytest.raises(
        UserError, match=r"the tensor unet\.conv_in\.weight reaches 1e\+06 and becomes infinite in fp16"
    ):
        export_generator(run, tmp_path / "out", ExportOptions(num_samples=0, device="cpu"))
    assert sorted(item.name for item in tmp_path.iterdir()) == ["run", "teacher"]
    assert export_generator(run, tmp_path / "out", ExportOptions(precision="bf16", num_samples=0, device="cpu"))


def test_the_network_alone(tmp_path: Path) -> None:
    """`--as unet`: loads in diffusers beside the teacher's other components, and here."""
    run = write_run(tmp_path, "sdxl", FOUR, LoraShape(4, 2.0))
    generator = load(run)
    expected = generator.sample(PROMPTS, seed=1, output="tensor")
    out = export_generator(run, tmp_path / "out", ExportOptions(kind="unet", precision="fp32", num_samples=0))
    unet, info = UNet2DConditionModel.from_pretrained(out, subfolder="unet", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "teacher", unet=unet)
    pipe.scheduler = LCMScheduler.from_pretrained(out, subfolder="scheduler")
    made = render(pipe, generator, 1, num_inference_steps=4, guidance_scale=1)
    assert (made - expected).abs().max() < 1e-3
    assert (load(out).sample(PROMPTS, seed=1, output="tensor") - expected).abs().max() < 1e-3
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=50)
    typed = render(pipe, generator, 1, num_inference_steps=4, guidance_scale=1, timesteps=list(FOUR))
    assert (typed - expected).abs().max() < 1e-3


def test_the_size_of_a_picture_is_the_one_it_was_trained_for(tmp_path: Path) -> None:
    run = write_run(tmp_path, "sd")
    card = run / "generator/fewstep.json"
    card.write_text(card.read_text().replace('"latent_size": 8', '"latent_size": 12'))
    pipe = open_pipeline(export_generator(run, tmp_path / "out", EXACT))
    pipe.set_progress_bar_config(disable=True)
    assert pipe("cat", num_inference_steps=4, guidance_scale=1).images[0].size == (24, 24)
    assert load(tmp_path / "out").sample(["cat"], output="tensor").shape == (1, 3, 24, 24)


def test_steps_that_cannot_travel_are_refused_for_a_pipeline_only(tmp_path: Path) -> None:
    run = write_run(tmp_path, "sd", (999, 749))
    with pytest.raises(UserError, match=r"the steps \[999, 749\] cannot travel"):
        export_generator(run, tmp_path / "out", EXACT)
    assert not (tmp_path / "out").exists()
    out = export_generator(run, tmp_path / "out", ExportOptions(kind="unet", precision="fp32", num_samples=0))
    assert not (out / "scheduler").exists()
    assert "timesteps=[999, 749]" in (out / "README.md").read_text()


def test_a_component_without_safetensors_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    folder = tmp_path / "teacher/safety_checker"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    index = tmp_path / "teacher/model_index.json"
    values = json.loads(index.read_text())
    values["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"safety_checker holds no weights as safetensors"):
        export_generator(run, tmp_path / "out", EXACT)
    assert not (tmp_path / "out").exists()
