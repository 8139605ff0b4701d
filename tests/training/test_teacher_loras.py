"""A teacher with the user's LoRAs merged: training sees the fine-tune, and the student is a delta on top of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

import fewstep
from fewstep.errors import UserError
from fewstep.estimate.describe import describe_distillation
from fewstep.export.export import ExportOptions, export_generator
from fewstep.models.load import load_generator, load_teacher
from fewstep.settings import TrainSettings, parse_settings
from fewstep.training.run import train
from tests.cli.test_main import fewstep as fewstep_command
from tests.export.text_generators import FOLDERS, PROMPTS, render
from tests.networks.test_merged_loras import user_lora, written
from tests.training.helpers import _merged

FAMILIES = [pytest.param("sd", marks=pytest.mark.long), "z-image"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers, a style for each, prompts."""
    place = tmp_path_factory.mktemp("styles")
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    for family in ("sd", "z-image"):
        network: Any = load_teacher(FOLDERS[family](place / family), device="cpu").denoiser
        written(place / f"{family}.safetensors", user_lora(network, family), "kohya", "")
    return place


def settings(work: Path, folder: Path, family: str = "z-image", **changes: Any) -> TrainSettings:
    values = {
        "teacher": {"path": str(work / family), "loras": [f"{work / family}.safetensors:0.5"], "guidance_scale": 2.0},
        "generator": {"step_indices": [999, 749, 499, 249]}, "data": {"prompts": str(work / "prompts.txt")},
        "memory": {"mode": "shared_base", "lora_rank": 2},
        "optimizer": {"generator_lr": 1e-1, "fake_score_lr": 1e-3, "warmup_steps": 0},
        "training": {"num_steps": 2, "batch_size": 2, "generator_every": 1},
        "compute": {"device": "cpu", "precision": "fp32"},
        "run": {"folder": str(folder), "sample_every": 100, "checkpoint_every": 1, "sample_images": 2},
    }  # fmt: skip
    return parse_settings(TrainSettings, _merged(values, changes), "test")


pytestmark = pytest.mark.usefixtures("few_teacher_steps")


def sampled(model: Any) -> Tensor:
    made: Tensor = model.sample(PROMPTS, seed=3, output="tensor", progress=False)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_on_the_users_lora_goes_everywhere(
    work: Path, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained, loaded, exported as its own LoRA on base and style, and as a pipeline that needs neither."""
    style = shutil.copy(f"{work / family}.safetensors", tmp_path / "style.safetensors")
    run = train(settings(work, tmp_path / "run", family, teacher={"loras": [f"{style}:0.5"]}))
    card = json.loads((run.model_folder / "fewstep.json").read_text())
    assert card["base_loras"] == [f"{Path(style).resolve()}:0.5"]
    generator = load_generator(run.folder, device="cpu")
    expected, merged = sampled(generator), load_teacher(work / family, device="cpu", loras=[f"{style}:0.5"])
    assert run.teacher.fingerprint == merged.fingerprint
    base = generator.denoiser.base_network.state_dict()
    kept = {name.replace(".base_layer.", "."): value for name, value in base.items() if ".lora_" not in name}
    assert all(torch.equal(value, kept[name]) for name, value in merged.denoiser.state_dict().items())
    own = fewstep.load_teacher(work / family, device="cpu").denoiser
    assert not torch.equal(next(iter(sampled(merged))), next(iter(sampled(load_teacher(work / family, device="cpu")))))
    assert any(not torch.equal(value, kept[name]) for name, value in own.state_dict().items())
    exact = ExportOptions(precision="fp32", num_samples=0, device="cpu")
    whole = export_generator(run.folder, tmp_path / "whole", exact)
    lora = export_generator(run.folder, tmp_path / "lora", ExportOptions(kind="lora", precision="fp32", num_samples=0))
    assert (sampled(load_generator(lora, device="cpu")) - expected).abs().max() < 1e-4
    in_diffusers(work / family, lora, generator, expected, style)
    monkeypatch.chdir(tmp_path)
    Path(style).unlink()
    assert (sampled(load_generator(whole, device="cpu")) - expected).abs().max() < 1e-4
    for folder in (run.folder, lora):
        with pytest.raises(
            UserError, match=r"with LoRAs merged into it, .*style\.safetensors:0\.5: put the files back, or into"
        ):
            load_generator(folder, device="cpu")
    shutil.copy(f"{work / family}.safetensors", lora / "style.safetensors")
    assert (sampled(load_generator(lora, device="cpu")) - expected).abs().max() < 1e-4


def in_diffusers(base: Path, lora: Path, generator: Any, expected: Tensor, style: Any) -> None:
    """What the card says: the style is fused into the base at its strength, then the student comes on top."""
    card = (lora / "README.md").read_text()
    lines = [
        f"pipe.load_lora_weights({str(Path(style).resolve())!r})",
        "pipe.fuse_lora(lora_scale=0.5)",
        "pipe.unload_lora_weights()",
    ]
    assert "\n".join(lines) in card
    assert "It was distilled on its base with `style` at 0.5** merged into it" in card.replace("\n", " ")
    pipe: Any = DiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(str(style))
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    import diffusers

    pipe.scheduler = getattr(diffusers, generator.family.scheduler_class).from_pretrained(lora, subfolder="scheduler")
    made = render(pipe, generator, 3, num_inference_steps=4, **generator.family.pipeline_options(generator.size))
    assert (made - expected).abs().max() < 1e-3


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_loras_only(work: Path, tmp_path: Path) -> None:
    """Wherever the file lies now; another strength, another file or none is refused by the setting's name."""
    path = shutil.copy(work / "z-image.safetensors", tmp_path / "style.safetensors")
    run = settings(work, tmp_path / "run", teacher={"loras": [str(path)]})
    train(_with(run, num_steps=1))
    moved = shutil.move(path, tmp_path / "moved.safetensors")
    for loras in ([f"{moved}:0.9"], [], [str(moved), f"{work / 'z-image'}.safetensors"]):
        with pytest.raises(UserError, match=r"teacher\.loras"):
            train(settings(work, tmp_path / "run", teacher={"loras": loras}))
    train(settings(work, tmp_path / "run", teacher={"loras": [str(moved)]}))
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 1


def _with(given: TrainSettings, **training: Any) -> TrainSettings:
    return given.model_copy(update={"training": given.training.model_copy(update=training)})


def test_a_lora_of_another_family_stops_before_a_run_begins(work: Path, tmp_path: Path) -> None:
    """A dry run says it in the same words."""
    save_file({}, tmp_path / "empty.safetensors")
    for lora, told in (
        (work / "sd.safetensors", "is a LoRA for another base: "),
        ("no.safetensors:0.5", "is no file; give FILE"),
        (tmp_path / "empty.safetensors", "is an empty LoRA: it has no layers"),
    ):
        asked = settings(work, tmp_path / "run", teacher={"loras": [str(lora)]})
        with pytest.raises(UserError, match=told) as refused:
            train(asked)
        assert not (tmp_path / "run").exists()
        with pytest.raises(UserError) as dry:
            list(describe_distillation(asked))
        assert str(dry.value) == str(refused.value)
    (first, *_) = describe_distillation(settings(work, tmp_path / "run"))
    assert first.startswith("network: ")


def test_a_dry_run_without_its_teacher_asks_for_the_lora_all_the_same() -> None:
    values = {"path": "runs/later", "loras": ["no.safetensors"]}
    with pytest.raises(UserError, match=r"no\.safetensors is no file; give FILE"):
        list(describe_distillation(parse_settings(TrainSettings, {"teacher": values}, "test")))


def test_a_dry_run_merges_no_lora_into_a_teacher_of_classes(work: Path, teacher_folder: Path) -> None:
    values = {"path": str(teacher_folder), "loras": [f"{work / 'sd'}.safetensors"]}
    with pytest.raises(UserError, match="is a class-conditional teacher: LoRAs are merged into text-to-image models"):
        list(describe_distillation(parse_settings(TrainSettings, {"teacher": values}, "test")))


@pytest.mark.slow
def test_pairs_of_the_plain_base_are_another_networks(work: Path, tmp_path: Path) -> None:
    common = ["--num-pairs", 2, "--teacher-steps", 1, "--prompts", work / "prompts.txt", "--device", "cpu"]
    lora = ["--lora", f"{work / 'z-image'}.safetensors:0.5"]
    for name, more in (("plain", []), ("own", lora)):
        answer = fewstep_command("prepare", "pairs", work / "z-image", tmp_path / name, *common, *more)
        assert answer.code == 0, answer.err

    def warm_up(name: str) -> None:
        losses = {"distribution_matching_weight": 0.0, "regression_weight": 1.0}
        train(settings(
            work, tmp_path / f"run-{name}", losses=losses, generator={"step_indices": [999]}, training={"num_steps": 1},
            data={"pairs": str(tmp_path / name), "prompts": ""}, memory={"mode": "full"},
        ))  # fmt: skip

    warm_up("own")
    with pytest.raises(UserError, match="was made by another network than the teacher's"):
        warm_up("plain")


@pytest.mark.slow
def test_the_command_shows_the_fine_tune(work: Path, tmp_path: Path) -> None:
    common = [
        "--prompt",
        PROMPTS[0],
        "--teacher-steps",
        2,
        "--guidance-scale",
        1,
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    style = f"{work / 'z-image'}.safetensors"
    for name, more in (("plain", []), ("styled", ["--lora", f"{style}:0.5"])):
        answer = fewstep_command("sample", work / "z-image", "--grid", tmp_path / f"{name}.png", *common, *more)
        assert answer.code == 0, answer.err
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "styled.png").read_bytes()
    answer = fewstep_command("sample", work / "sd", "--grid", tmp_path / "no.png", *common, "--lora", style)
    assert (answer.code, answer.err.count("is a LoRA for another base")) == (2, 1)
    assert not (tmp_path / "no.png").exists()


@pytest.mark.slow
def test_nothing_of_this_machine_leaves_with_a_pushed_card(work: Path, tmp_path: Path) -> None:
    run = train(_with(settings(work, tmp_path / "run"), num_steps=1))
    options = ExportOptions(kind="lora", precision="fp32", num_samples=0, repo="ann/tiny")
    out = export_generator(run.folder, tmp_path / "out", options)
    assert json.loads((out / "fewstep.json").read_text())["base_loras"] == ["z-image.safetensors:0.5"]
    for path in out.rglob("*"):
        assert not path.is_file() or str(work).encode() not in path.read_bytes(), path
