"""Text-to-image models from diffusers folders: the same embeddings and pictures as diffusers' own pipelines."""

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewstep
from fewstep.diffusion.samplers import sample_ddim, sample_noise, trailing_indices
from fewstep.errors import UserError
from fewstep.families.registry import recognise
from fewstep.formats.model_folder import ModelCard
from fewstep.models.model import Model
from fewstep.networks.adapters import LoraShape, SharedBase
from tests.tiny_models import tiny_sd2_folder, tiny_sd3_folder, tiny_sd_folder, tiny_sdxl_folder

FOLDERS = {"sd": tiny_sd_folder, "sd2": tiny_sd2_folder, "sdxl": tiny_sdxl_folder, "sd3": tiny_sd3_folder}
PROMPTS = ["red cat", "a dog", "cat"]


@pytest.fixture(scope="module", params=list(FOLDERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FOLDERS[request.param](tmp_path_factory.mktemp("models") / request.param)


def load(folder: Path) -> Model:
    teacher = fewstep.load_teacher(folder, device="cpu")
    return teacher


def test_family_is_read_from_the_folder(folder: Path) -> None:
    family = "sd" if folder.name == "sd2" else folder.name
    assert recognise(folder).name == family
    assert load(folder).family.name == family


def test_pictures_are_those_of_the_pipeline(folder: Path) -> None:
    """Guided, 6 steps, the same starting noise: diffusers' own pipeline gives the same pictures."""
    teacher = load(folder)
    ours = teacher.sample(PROMPTS, seed=3, num_inference_steps=6, guidance_scale=5.0, output="tensor")
    absent = {"text_encoder_3": None, "tokenizer_3": None} if folder.name == "sd3" else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    options = {}
    if folder.name == "sd3":  # the scheduler shifts these times itself
        options["sigmas"] = [(index + 1) / 1000 for index in trailing_indices(6, 1000)]
    else:
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    noise = sample_noise(teacher.denoiser, 3, 0, len(PROMPTS), torch.device("cpu"))
    theirs = pipeline(
        PROMPTS, num_inference_steps=6, guidance_scale=5.0, latents=noise.clone(), output_type="pt",
        height=16, width=16, **options,
    ).images  # fmt: skip
    # diffusers takes the level after step k from its own spacing, ours from the grid; the last level differs for SD
    assert ours.shape == (3, 3, 16, 16)
    assert (ours - (theirs * 2 - 1)).abs().max() < (2e-2 if folder.name != "sd3" else 1e-3)


def test_a_picture_does_not_depend_on_its_batch(folder: Path) -> None:
    teacher = load(folder)
    whole = teacher.sample(PROMPTS, seed=5, num_inference_steps=2, batch_size=3, output="tensor")
    single = teacher.sample(PROMPTS[1:2], seed=5, num_inference_steps=2, first=1, output="tensor")
    assert (whole[1] - single[0]).abs().max() < 1e-4
    assert (whole[0] - whole[2]).abs().max() > 1e-3


def test_prompts_matter_and_the_empty_branch_is_the_familys_own(folder: Path) -> None:
    teacher = load(folder)
    table = teacher.conditioner.table(PROMPTS, teacher.size)
    condition = table.rows(torch.tensor([2, 0]))
    empty = condition.unconditional()
    assert not torch.equal(condition["text"][0], condition["text"][1])
    if folder.name == "sdxl":
        assert empty["text"].abs().max() == 0
        assert empty["pooled"].abs().max() == 0
        assert condition["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
        assert torch.equal(empty["time_ids"], condition["time_ids"])
    else:
        assert torch.allclose(empty["text"][0], teacher.conditioner.encoders.encode([""]).text[0])


def test_prediction_type_comes_from_the_scheduler(tmp_path: Path) -> None:
    """The same random network read as epsilon and as v gives different pictures, each diffusers' own."""
    pictures: list[Tensor] = []
    for kind in ("epsilon", "v_prediction"):
        folder = tiny_sd_folder(tmp_path / kind, prediction_type=kind)
        denoiser: Any = recognise(folder).load(folder)
        assert denoiser.prediction == kind
        pictures.append(load(folder).sample(["cat"], num_inference_steps=4, guidance_scale=1.0, output="tensor"))
        scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler", timestep_spacing="trailing")
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == trailing_indices(4, 1000)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-2


def test_generator_folder_round_trip(folder: Path, tmp_path: Path) -> None:
    teacher = load(folder)
    with torch.no_grad():
        for parameter in teacher.denoiser.parameters():
            parameter.mul_(1.01)
    card = ModelCard(role="generator", step_indices=(999, 499))
    teacher.student(teacher.denoiser, card).write(tmp_path / "generator")
    generator = fewstep.load_generator(tmp_path, device="cpu")
    assert generator.evaluations() == 2
    expected = teacher.student(teacher.denoiser, card).sample(PROMPTS, seed=1, output="tensor")
    assert torch.equal(generator.sample(PROMPTS, seed=1, output="tensor"), expected)


def test_a_generators_numbers_that_are_none(folder: Path, tmp_path: Path) -> None:
    teacher = load(folder)
    teacher.student(teacher.denoiser, ModelCard("generator", step_indices=(999,))).write(tmp_path / "generator")
    (path,) = (tmp_path / "generator").rglob("*.safetensors")
    weights = load_file(path)
    weights[name := max(weights)].view(-1)[0] = float("nan")
    save_file(weights, path)
    with pytest.raises(
        UserError, match=re.escape(f"{path}: 1 of the ") + rf".* in {re.escape(name)} are infinite or NaN"
    ):
        fewstep.load_generator(tmp_path / "generator", device="cpu")


def test_a_name_that_says_v_beside_a_scheduler_that_says_epsilon(tmp_path: Path, capsys: Any) -> None:
    load(tiny_sd_folder(tmp_path / "my_vpred_model"))
    words = " ".join(capsys.readouterr().err.split())
    assert "predicts v by its name, its scheduler says epsilon (prediction_type)" in words
    load(tiny_sd_folder(tmp_path / "right_vpred_model", prediction_type="v_prediction"))
    assert "by its name" not in capsys.readouterr().err


def test_a_generator_whose_base_is_gone(tmp_path: Path) -> None:
    teacher = load(tiny_sd_folder(tmp_path / "base"))
    adapter = SharedBase(teacher.denoiser, LoraShape(rank=2, alpha=2.0)).add_role("generator")
    teacher.student(adapter, ModelCard("generator", (999,), base=str(tmp_path / "base"))).write(tmp_path / "lora")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"put it back, or write where it lies now as base into .*lora/fewstep\.json"):
        fewstep.load_generator(tmp_path / "lora", device="cpu")
    card = tmp_path / "lora/fewstep.json"
    card.write_text(card.read_text().replace(str(tmp_path / "base"), str(tmp_path / "moved")))
    fewstep.load_generator(tmp_path / "lora", device="cpu")


def test_resolution_can_be_chosen(tmp_path: Path) -> None:
    folder = tiny_sd_folder(tmp_path / "sd")
    teacher = fewstep.load_teacher(folder, device="cpu", resolution=24)
    assert teacher.denoiser.image_shape == (4, 12, 12)
    assert teacher.denoiser.feature_shapes[0] == (32, 6, 6)
    assert teacher.sample(["cat"], num_inference_steps=1, output="tensor").shape == (1, 3, 24, 24)
    with pytest.raises(UserError, match=r"teacher\.resolution=25 is not a multiple of the VAE's factor 2"):
        fewstep.load_teacher(folder, resolution=25)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(tmp_path: Path, component: str) -> None:
    import shutil

    folder = tiny_sd_folder(tmp_path / "sd")
    shutil.rmtree(folder / component)
    with pytest.raises(UserError, match=rf"{folder}.* component {component} is missing"):
        load(folder).sample(["cat"], num_inference_steps=1, output="tensor")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a fewstep model"):
        fewstep.load_teacher(tmp_path / "empty")
    with pytest.raises(UserError, match="does not exist"):
        fewstep.load_teacher(tmp_path / "nothing")


def test_epsilon_without_signal_is_refused(tmp_path: Path) -> None:
    folder = tiny_sd_folder(tmp_path / "sd")
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(
        config.read_text()
        .replace('"epsilon"', '"epsilon",\n "rescale_betas_zero_snr": true')
        .replace('"rescale_betas_zero_snr": false,', "")
    )
    with pytest.raises(UserError, match="zero signal"):
        fewstep.load_teacher(folder)


def test_sampler_needs_possible_steps(tmp_path: Path) -> None:
    teacher = load(tiny_sd_folder(tmp_path / "sd"))
    condition = teacher.conditioner.table(["cat"], teacher.size).rows(torch.tensor([0]))
    with pytest.raises(ValueError, match="num_steps=0"):
        sample_ddim(teacher.denoiser, torch.zeros(1, 4, 8, 8), condition, num_steps=0)


def test_evaluate_on_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Teacher and generator are measured on the same prompts against real pictures, each with its evaluations."""
    from typer.testing import CliRunner

    from fewstep.cli.main import app
    from fewstep.evaluation.features import SmallClassifier
    from tests.conftest import write_pictures

    folder = tiny_sd_folder(tmp_path / "sd")
    teacher = load(folder)
    student = teacher.student(teacher.denoiser, ModelCard(role="generator", step_indices=(999, 499)))
    student.write(tmp_path / "run/generator")
    torch.manual_seed(0)
    SmallClassifier(3, 4, width=4, name="tiny").eval().save(tmp_path / "features")
    pictures = write_pictures(tmp_path / "pictures", count=30, channels=3)
    (tmp_path / "prompts.txt").write_text("cat\ndog\nred cat\n")
    common = [
        "--features",
        str(tmp_path / "features"),
        "--images",
        str(pictures),
        "--num-images",
        "8",
        "--device",
        "cpu",
    ]
    for model, extra, how in (
        (folder, ["--teacher-steps", "3"], "3 evaluations per image at guidance 7.5"),
        (tmp_path / "run", [], "2 evaluations per image"),
    ):
        arguments = ["evaluate", str(model), *common, "--prompts", str(tmp_path / "prompts.txt"), *extra]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert f"8 images against 30 real ones, features tiny, {how}, seed 0" in result.output
    with pytest.raises(UserError, match="text-to-image models are measured with --prompts FILE"):
        CliRunner().invoke(app, ["evaluate", str(folder), *common], catch_exceptions=False)
