"""`fewstep sample` and `fewstep export` on damaged and foreign models: one sentence, exit code 2, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.formats.model_folder import ModelCard, write_model_folder
from fewstep.networks.adapters import LoraShape
from tests.cli.test_main import fewstep
from tests.conftest import tiny_denoiser
from tests.export.text_generators import write_run
from tests.tiny_models import tiny_sdxl_folder, tiny_taesd_folder

FILE = "diffusion_pytorch_model.safetensors"
WEIGHTS = {
    "classes": f"unet/{FILE}",
    "network": f"run/generator/unet/{FILE}",
    "lora": "run/generator/adapter.safetensors",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator of four classes, and two of text: a whole network and a LoRA."""
    folder, denoiser = tmp_path_factory.mktemp("models"), tiny_denoiser(seed=3)
    card = ModelCard(role="generator", step_indices=(999,))
    write_model_folder(folder / "classes", denoiser.describe(), denoiser.state_dict(), card)
    write_run(folder / "network", "sd", (999,))
    write_run(folder / "lora", "sd", (999,), LoraShape(4, 4.0))
    return folder


def copied(models: Path, name: str, tmp_path: Path) -> tuple[Path, Path]:
    """(model, its weights file) of a copy to be damaged; it reads its teacher where it was."""
    shutil.copytree(models / name, tmp_path / name)
    return tmp_path / name / ("" if name == "classes" else "run"), tmp_path / name / WEIGHTS[name]


def refused(command: str, model: object, tmp_path: Path, *more: object) -> str:
    """The one sentence; what was there before is all there is afterwards."""
    before = sorted(tmp_path.rglob("*"))
    target = ("--out", tmp_path / "out") if command == "sample" else (tmp_path / "out", "--num-samples", 0)
    answer = fewstep(command, model, *target, "--device", "cpu", *more)
    assert (answer.code, answer.out) == (2, ""), answer
    assert answer.err.startswith("fewstep: ")
    assert answer.err.count("\n") == 1, answer.err
    assert sorted(tmp_path.rglob("*")) == before
    return answer.err.removeprefix("fewstep: ").rstrip("\n")


def both(name: str, model: Path, tmp_path: Path) -> list[str]:
    prompt = () if name == "classes" else ("--prompt", "cat")
    return [refused("sample", model, tmp_path, *prompt), refused("export", model, tmp_path)]


@pytest.mark.parametrize("name", WEIGHTS)
def test_truncated_and_lacking_weights(models: Path, tmp_path: Path, name: str) -> None:
    model, weights = copied(models, name, tmp_path)
    weights.write_bytes(weights.read_bytes()[:-100])
    for words in both(name, model, tmp_path):
        assert words.startswith(f"{weights} cannot be read (")
    weights.unlink()
    for words in both(name, model, tmp_path):
        assert "is missing" in words or "cannot be read (No such file" in words


@pytest.mark.parametrize("name", WEIGHTS)
def test_another_models_state(models: Path, tmp_path: Path, name: str) -> None:
    model, weights = copied(models, name, tmp_path)
    other = {"classes": "network", "network": "lora", "lora": "network"}[name]
    shutil.copyfile(models / other / WEIGHTS[other], weights)
    keys = {"classes": "unexpected (e.g. conv_in.bias", "network": "e.g. conv_in.weight", "lora": "e.g. network."}
    for words in both(name, model, tmp_path):
        assert keys[name] in words
        assert str(model) in words


@pytest.mark.slow
def test_a_lora_on_another_base(models: Path, tmp_path: Path) -> None:
    """Both commands: the base has been exchanged where it lies, or another is given."""
    other = tiny_sdxl_folder(tmp_path / "other")
    words = refused("export", models / "lora/run", tmp_path, "--base", other, "--as", "lora")
    assert f"is a LoRA for another base than {other}: " in words
    model, _ = copied(models, "lora", tmp_path)
    card = model / "generator/fewstep.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "base": str(other)}))
    assert "is a LoRA for another base than" in refused("sample", model, tmp_path, "--prompt", "cat")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kinds"), [("network", ("diffusers", "unet", "single-file")), ("lora", ("lora", "kohya-lora"))]
)
def test_infinities(models: Path, tmp_path: Path, name: str, kinds: tuple[str, ...]) -> None:
    """Finite values that fp16 cannot hold name the tensor and the way out; infinities are told apart."""
    model, weights = copied(models, name, tmp_path)
    state = load_file(weights)
    key = next(key for key in state if key.endswith("weight"))
    state[key].view(-1)[0] = 1e6
    save_file(state, weights)
    for kind in kinds:
        words = refused("export", model, tmp_path, "--as", kind)
        assert words.endswith("reaches 1e+06 and becomes infinite in fp16; choose --dtype bf16 or fp32")
    state[key].view(-1)[0] = torch.inf
    save_file(state, weights)
    for kind in kinds:
        assert "are infinite or NaN" in refused("export", model, tmp_path, "--as", kind, "--dtype", "fp32")


@pytest.mark.parametrize(
    ("part", "damage", "told"),
    [
        ("unet/" + FILE, Path.unlink, "teacher/unet cannot be loaded (Error no file named"),
        ("vae/" + FILE, lambda path: path.write_bytes(b"xx"), "teacher/vae cannot be loaded (Error while"),
        ("text_encoder/model.safetensors", lambda path: path.write_bytes(b"xx"), "teacher/text_encoder cannot be loaded (Error while"),
        ("model_index.json", lambda path: path.write_text("{"), "model_index.json is damaged"),
        ("unet/config.json", lambda path: path.write_text("{"), "unet/config.json is damaged"),
    ],
)  # fmt: skip
def test_damaged_teachers(models: Path, tmp_path: Path, part: str, damage: Callable[[Path], object], told: str) -> None:
    shutil.copytree(models / "network/teacher", tmp_path / "teacher")
    damage(tmp_path / "teacher" / part)
    assert told in refused("sample", tmp_path / "teacher", tmp_path, "--prompt", "cat", "--teacher-steps", 1)


def test_empty_folders_and_existing_ones(models: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in ("sample", "export"):
        assert "empty is not a fewstep model: unet/config.json is missing" in refused(
            command, tmp_path / "empty", tmp_path
        )
    (tmp_path / "out").mkdir()
    assert refused("export", models / "classes", tmp_path).startswith(f"{tmp_path / 'out'} exists already")


def test_bundled_teachers_are_no_generators(tmp_path: Path) -> None:
    words = refused("export", "bundled:fashion-mnist", tmp_path)
    assert words.startswith("bundled:fashion-mnist is a teacher, not a generator: distil it")


def test_a_truncated_taesd(models: Path, tmp_path: Path) -> None:
    tiny = tiny_taesd_folder(tmp_path / "taesd")
    (tiny / FILE).write_bytes((tiny / FILE).read_bytes()[:1000])
    words = refused("sample", models / "network/run", tmp_path, "--prompt", "cat", "--tiny-vae", tiny)
    assert words.startswith(f"--tiny-vae: {tiny} cannot be loaded (Error while deserializing header")


def test_options_for_the_other_kind_of_model(models: Path, tmp_path: Path) -> None:
    words = refused("sample", models / "classes", tmp_path, "--prompt", "cat")
    assert words == "--prompt and --prompts are for text-to-image models; this one takes --labels"
    words = refused("sample", models / "network/run", tmp_path, "--labels", 1)
    assert words == "a text-to-image model takes --prompt or --prompts (and no --labels)"
    words = refused("sample", models / "classes", tmp_path, "--labels", "0,4-5")
    assert words == "--labels [4, 5] do not fit the model's 4 classes"


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_guidance_is_a_number(models: Path, tmp_path: Path, scale: str) -> None:
    teacher = models / "network/teacher"
    words = refused("sample", teacher, tmp_path, "--prompt", "cat", "--guidance-scale", scale)
    assert words == f"--guidance-scale {scale}: give a finite number, e.g. 5"


def test_guidance_of_a_teacher_without_it(tmp_path: Path) -> None:
    denoiser = tiny_denoiser()
    write_model_folder(tmp_path / "teacher", denoiser.describe(), denoiser.state_dict(), ModelCard(role="teacher"))
    words = refused("sample", tmp_path / "teacher", tmp_path, "--guidance-scale", 2)
    assert words.startswith("--guidance-scale: ")
    assert "trained without label dropout" in words
