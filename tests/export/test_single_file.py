"""One file for a whole generator: diffusers' own single-file loader renders the same pictures from it."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_lcm
from safetensors import safe_open
from safetensors.torch import load_file

import fewstep
from fewstep.diffusion.samplers import sample_noise
from fewstep.errors import UserError
from fewstep.export import assumed_facts
from fewstep.export.export import ExportOptions, export_generator
from fewstep.export.lora import base_denoiser
from fewstep.export.single_file import export_single_file, generator_sigmas, single_file_tensors
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.families.registry import build_on_meta, family_named, released_shapes
from fewstep.formats.model_folder import ModelCard
from fewstep.models.model import Model
from fewstep.preparation.single_file import read_model_file, single_file_to_folder
from tests.export.single_file_models import FOLDERS, load_generator
from tests.tiny_models import tiny_sd3_folder, tiny_sd_folder

PROMPTS = ["red cat", "a dog"]
PIPELINES = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


@pytest.fixture(scope="module", params=list(FOLDERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FOLDERS[request.param](tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FOLDERS["sd"](tmp_path_factory.mktemp("models") / "sd")


def rendered_by_diffusers(path: Path, generator: Model, seed: int, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Pictures in [-1, 1] of `from_single_file`'s pipeline, with the noises that `fewstep sample` uses."""
    kind = getattr(diffusers, PIPELINES[generator.family.name])
    pipeline = kind.from_single_file(str(path), config=str(generator.folder), local_files_only=True)
    steps = generator.step_schedule.indices
    base = base_denoiser(generator)
    betas: Any = diffusers.DDIMScheduler(
        **{k: v for k, v in base.scheduler_config.items() if k.startswith(("beta", "num_train"))}  # type: ignore[attr-defined]
    ).betas
    last = steps[0] + 1
    pipeline.scheduler = diffusers.LCMScheduler(
        num_train_timesteps=last, trained_betas=betas[:last].tolist(), original_inference_steps=len(steps),
        prediction_type=base.prediction,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    count, device = len(PROMPTS), torch.device("cpu")
    noises = [sample_noise(generator.denoiser, seed, 0, count, device, step=number) for number in range(len(steps))]
    fresh = iter(noises[1:])
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(fresh))
    height, width = generator.size
    pictures = pipeline(
        PROMPTS, num_inference_steps=len(steps), guidance_scale=1.0, latents=noises[0].clone(), output_type="pt",
        height=height, width=width,
    ).images  # fmt: skip
    return pictures * 2 - 1


@pytest.mark.parametrize(
    ("steps", "lora"),
    [
        ((999, 749, 499, 249), True), ((399,), False),
        *(pytest.param(*pair, marks=pytest.mark.long) for pair in [
            ((999, 749, 499, 249), False), ((399,), True), ((999,), False), ((999,), True),
        ]),
    ],
    ids=str,
)  # fmt: skip
def test_diffusers_renders_the_same_pictures(
    folder: Path, steps: tuple[int, ...], lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = load_generator(folder, *steps, lora=lora)
    path = export_single_file(generator, tmp_path / "new" / "model.safetensors", torch.float32)
    theirs = rendered_by_diffusers(path, generator, 3, monkeypatch)
    ours = generator.sample(PROMPTS, seed=3, output="tensor")
    assert (ours - theirs).abs().max() < 1e-3
    if lora:  # the LoRA is in the file, and it matters
        assert (ours - load_generator(folder, *steps).sample(PROMPTS, seed=3, output="tensor")).abs().max() > 1e-2
    assert not list(path.parent.glob(".*"))


def test_v_prediction_is_said_and_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_sd_folder(tmp_path / "v", prediction_type="v_prediction")
    generator = load_generator(folder, 999, 499)
    path = export_single_file(generator, tmp_path / "v.safetensors", torch.float32)
    ours = generator.sample(PROMPTS, seed=3, output="tensor")
    assert (ours - rendered_by_diffusers(path, generator, 3, monkeypatch)).abs().max() < 1e-3
    with safe_open(path, "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "v"
        assert "v_pred" in file.keys()  # noqa: SIM118  # by which ComfyUI and stable-diffusion.cpp know it
        assert "ztsnr" not in file.keys()  # noqa: SIM118
        assert file.metadata()["fewstep.prediction_type"] == "v_prediction"


def test_the_header_says_how_to_run_it(sd: Path, tmp_path: Path) -> None:
    generator = load_generator(sd, 999, 749, 499, 249)
    path = export_single_file(generator, tmp_path / "model.safetensors", torch.float16)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["modelspec.architecture"] == "stable-diffusion-v1"
    assert header["modelspec.sai_model_spec"] == "1.0.0"
    assert header["modelspec.prediction_type"] == "epsilon"
    assert header["modelspec.resolution"] == "16x16"
    assert header["modelspec.license"] == header["fewstep.licence"] == "openrail++"
    assert json.loads(header["fewstep.step_indices"]) == [999, 749, 499, 249]
    assert json.loads(header["fewstep.recipe"]) == {"recipe": "tiny"}
    assert header["fewstep.version"] == fewstep.__version__
    assert header["fewstep.base"] == Path(generator.base).name  # not where it lies on this machine
    assert json.loads(header["fewstep.sigmas"]) == generator_sigmas(generator)
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}


def test_sigmas_are_those_of_the_timesteps(sd: Path) -> None:
    """Stable Diffusion's last level has the well-known 14.6146."""
    cumprod = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    expected = ((1 - cumprod) / cumprod).sqrt()[[999, 399]]
    sigmas = generator_sigmas(load_generator(sd, 999, 399))
    assert sigmas == pytest.approx(expected.tolist(), rel=1e-5)
    assert sigmas[0] == pytest.approx(14.6146, abs=1e-4)


def test_a_number_that_becomes_infinite_is_named(sd: Path, tmp_path: Path) -> None:
    generator = load_generator(sd, 999)
    assert isinstance(generator.denoiser, DiffusersDenoiser)
    bias: Any = generator.denoiser.network.get_parameter("conv_out.bias")
    with torch.no_grad():
        bias[0] = 70000.0
    out = tmp_path / "new" / "model.safetensors"
    with pytest.raises(UserError, match=r"model\.diffusion_model\.out\.2\.bias"):
        export_single_file(generator, out, torch.float16)
    assert not out.parent.exists()
    export_single_file(generator, out, torch.bfloat16)
    with torch.no_grad():
        bias[0] = float("nan")
    with pytest.raises(UserError, match=r"out\.2\.bias holds infinities or NaNs"):
        export_single_file(generator, out.with_name("other.safetensors"), torch.float32)


def test_what_is_refused(sd: Path, tmp_path: Path) -> None:
    generator = load_generator(sd, 999)
    (tmp_path / "taken.safetensors").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        export_single_file(generator, tmp_path / "taken.safetensors", torch.float32)
    assert (tmp_path / "taken.safetensors").read_text(encoding="utf-8") == "mine"
    with pytest.raises(UserError, match="must end in"):
        export_single_file(generator, tmp_path / "model.ckpt", torch.float32)
    with pytest.raises(UserError, match="cannot write"):
        export_single_file(generator, tmp_path / "taken.safetensors" / "model.safetensors", torch.float32)
    with pytest.raises(ValueError, match="choose"):
        export_single_file(generator, tmp_path / "model.safetensors", torch.float64)
    teacher = fewstep.load_teacher(tiny_sd3_folder(tmp_path / "sd3"), device="cpu")
    other = teacher.student(teacher.denoiser, ModelCard("generator", (999,)))
    with pytest.raises(UserError, match="sd3 keeps its transformer under other keys"):
        export_single_file(other, tmp_path / "model.safetensors", torch.float32)
    text: Any = generator.conditioner.encoders.modules[0]
    text.config.hidden_act = "gelu"
    with pytest.raises(UserError, match=r"text encoder of 2\.x"):
        export_single_file(generator, tmp_path / "model.safetensors", torch.float32)


def test_a_full_disk_leaves_nothing(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, tensors: Any, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fewstep.export.single_file.write_tensor_file", full)
    with pytest.raises(UserError, match="No space left"):
        export_single_file(load_generator(sd, 999), tmp_path / "model.safetensors", torch.float32)
    assert not list(tmp_path.iterdir())


def test_the_file_becomes_a_teacher_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    """Out and in again: the folder made from the file is the same model."""
    generator = load_generator(folder, 999, 499)
    path = export_single_file(generator, tmp_path / "model.safetensors", torch.float32)
    single = read_model_file(path)
    assert single.layout.family == generator.family.name
    made = single_file_to_folder(path, folder, tmp_path / "folder")
    teacher = fewstep.load_teacher(made, device="cpu")
    again = teacher.student(teacher.denoiser, generator.card)
    written, returned = single_file_tensors(generator), single_file_tensors(again)
    assert written.keys() == returned.keys()
    assert all(torch.equal(written[key], returned[key]) for key in written)
    assert torch.equal(
        again.sample(PROMPTS, seed=1, output="tensor"), generator.sample(PROMPTS, seed=1, output="tensor")
    )
    pipeline = diffusers.DiffusionPipeline.from_pretrained(made, local_files_only=True)
    assert type(pipeline).__name__ == PIPELINES[generator.family.name]


@pytest.mark.parametrize(("family", "name"), [("sd", "sd15"), ("sdxl", "sdxl")])
def test_published_settings_are_what_programs_take(family: str, name: str) -> None:
    layout: Any = family_named(family).single_file
    network: Any = dict(cast(Any, build_on_meta(released_shapes()[name])).network.config)
    for component, config in (("unet", network), ("scheduler", released_shapes()[name]["scheduler"])):
        for key, value in layout.assumed(component, config).items():
            found = config[key]
            assert (list(found) if isinstance(found, tuple | list) else found) == value, key


def test_facts_that_a_file_has_no_place_for(sd: Path, tmp_path: Path) -> None:
    """Programs would take others: said on the way and in the card."""
    told: list[str] = []
    load_generator(sd, 999).write(tmp_path / "generator")
    changes = {"vae": {"scaling_factor": 0.5}, "text_encoder": {"num_hidden_layers": 1}}
    base = shutil.copytree(sd, tmp_path / "base")
    for part, values in changes.items():
        path = base / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    facts = _all_facts(load_generator(base, 999))
    assert "vae scaling_factor=0.5 (0.18215 is taken)" in facts
    assert "text_encoder num_hidden_layers=1 (12 is taken)" in facts
    assert "the scheduler's betas" not in facts
    path = base / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_end": 0.02}))
    assert "the scheduler's betas" in _all_facts(load_generator(base, 999))
    options = ExportOptions("single-file", base=str(sd), num_samples=0, device="cpu", tell=told.append)
    export_generator(tmp_path / "generator", tmp_path / "out", options)
    assert told
    assert told[0].startswith("warning: a single file has no place for unet norm_num_groups=8 (32 is taken)")
    assert "no place for unet norm_num_groups=8" in (tmp_path / "out/README.md").read_text()


def _all_facts(generator: Model) -> list[str]:
    return list(assumed_facts._facts(generator))
