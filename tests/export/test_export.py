"""`fewstep export`: what it writes beside the weights, what it refuses, and the upload."""

import errno
import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image

import fewstep
from fewstep.errors import UserError
from fewstep.export import shareable
from fewstep.export.card_usage import hub_name
from fewstep.export.export import ExportOptions, export_generator
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.families.edm.folder import describe_edm_arguments
from fewstep.families.edm.shapes import build_network_config
from fewstep.formats.edm_pickle import read_edm_pickle
from fewstep.formats.model_folder import ModelCard, write_model_folder
from fewstep.networks.adapters import LoraShape
from tests.cli.test_main import fewstep as run_command
from tests.conftest import golden_denoiser, tiny_denoiser
from tests.export.text_generators import FOUR, write_run
from tests.training.test_checkpoint import small_disk


def class_run(folder: Path, denoiser: Any = None) -> Path:
    denoiser = denoiser or tiny_denoiser()
    card = ModelCard(
        role="generator", step_indices=(999,), licence="cc0-1.0",
        made_with={"num_steps": 20, "settings": {"best": {"features": "/x/inception.pth", "num_images": 500}}},
    )  # fmt: skip
    write_model_folder(folder / "run/generator", denoiser.describe(), denoiser.state_dict(), card)
    return folder / "run"


def execute(readme: str) -> list[dict[str, Any]]:
    """Run every Python block of a README as it is printed."""
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert blocks
    spaces: list[dict[str, Any]] = []
    for block in blocks:
        spaces.append({})
        exec(compile(block, "README.md", "exec"), spaces[-1])
    return spaces


@pytest.mark.parametrize(
    ("kind", "family", "lora"),
    [("diffusers", "sd", False), ("diffusers", "sd3", False), ("unet", "sdxl", False), ("lora", "sd", True),
     ("kohya-lora", "sd", True)],
)  # fmt: skip
def test_the_card_of_a_text_export_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, family: str, lora: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path, family, FOUR, LoraShape(4, 2.0) if lora else None, licence="openrail")
    options = ExportOptions(kind=kind, num_samples=2, prompts=("cat",), device="cpu")
    out = export_generator(run, tmp_path / "my-model", options)
    readme = (out / "README.md").read_text(encoding="utf-8")
    execute(readme)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (16, 16)
    with Image.open(out / "samples.png") as grid:
        assert grid.size == (33, 16)
    header = readme.split("---")[1]
    assert "library_name: diffusers" in header
    assert "license: openrail" in header
    assert "pipeline_tag: text-to-image" in header
    assert ("- lora" in header) == lora
    assert "base_model" not in header  # a local folder is no name on the hub
    assert huggingface_hub.ModelCard(readme).data.license == "openrail"
    assert "999, 749, 499, 249" in readme
    assert "1. cat\n2. cat" in readme


@pytest.mark.parametrize(("kind", "lora"), [("single-file", None), ("kohya-lora", LoraShape(4, 2.0))])
def test_files_for_comfyui_have_a_workflow(tmp_path: Path, kind: str, lora: LoraShape | None) -> None:
    options = ExportOptions(kind=kind, num_samples=0, device="cpu")
    out = export_generator(write_run(tmp_path, "sd", FOUR, lora), tmp_path / "my-model", options)
    assert (out / "my-model.safetensors").is_file()
    nodes = json.loads((out / "comfyui_workflow.json").read_text(encoding="utf-8")).values()
    names = [value for node in nodes for value in node["inputs"].values()]
    assert "my-model.safetensors" in names
    assert ("teacher.safetensors" in names) == (lora is not None)
    assert (out / "README.md").is_file()


def test_class_conditional_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the figures of the run."""
    monkeypatch.chdir(tmp_path)
    run = class_run(tmp_path)
    (run / "best.json").write_text(
        json.dumps([{"step": 10, "frechet_distance": 9.0}, {"step": 20, "frechet_distance": 7.25}])
    )
    measured = {
        "model": "generator",
        "frechet_distance": 6.5,
        "num_images": 1000,
        "features": "inception",
        "evaluations_per_image": 1,
    }
    (run / "report.json").write_text(json.dumps({"generator": measured, "curve": [[1, 2]]}))
    (run / "alarms.json").write_text("{")
    out = export_generator(run, tmp_path / "out", ExportOptions(device="cpu"))
    assert torch.equal(
        fewstep.load_generator(out).sample(3, seed=1, output="tensor"),
        fewstep.load_generator(run).sample(3, seed=1, output="tensor"),
    )  # type: ignore[call-overload, arg-type]
    readme = (out / "README.md").read_text(encoding="utf-8")
    spaces = execute(readme)
    assert len(spaces[0]["images"]) == 4
    assert "| Frechet distance at step 20 (500 images, features inception.pth) | 7.250 |" in readme
    assert (
        "| Frechet distance of generator (1000 images, features inception, 1 evaluations an image) | 6.500 |" in readme
    )
    assert "9.000" not in readme
    assert "license: cc0-1.0" in readme


@pytest.mark.parametrize("family", ["adm", "ddpmpp", "ncsnpp"])
def test_edm_pickle_comes_back(tmp_path: Path, family: str) -> None:
    denoiser, _ = golden_denoiser(family)
    run = class_run(tmp_path, denoiser)
    out = export_generator(run, tmp_path / "out", ExportOptions(kind="edm", num_samples=2, device="cpu"))
    pickle = read_edm_pickle(out / "out.pkl")
    assert describe_edm_arguments(pickle.init_kwargs) == {
        **denoiser.describe(),
        "network": describe_edm_arguments(pickle.init_kwargs)["network"],
    }
    [space] = execute((out / "README.md").read_text(encoding="utf-8"))
    expected = fewstep.load_generator(run, device="cpu")
    assert expected.is_generator
    assert torch.equal(space["images"], expected.sample(4, seed=0, output="tensor"))


def test_folded_networks_are_no_edm_networks(tmp_path: Path) -> None:
    config = build_network_config("tiny", img_resolution=16, img_channels=1, label_dim=4)
    if config.fold == 1:
        config = type(config).from_dict({**config.to_dict(), "fold": 2})
    run = class_run(tmp_path, EDMDenoiser(config))
    with pytest.raises(UserError, match="folds 2x2 pixels into channels"):
        export_generator(run, tmp_path / "out", ExportOptions(kind="edm", num_samples=0))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("/c/hub/models--runwayml--sd-v1-5/snapshots/abc", "runwayml/sd-v1-5"), ("/c/hub/models--gpt2/snapshots/abc", "gpt2"), ("/home/me/sd", ""), ("./sd/x", ""), ("", ""),
    ],
)  # fmt: skip
def test_names_on_the_hub(base: str, name: str) -> None:
    assert hub_name(base) == name


def test_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Only when asked for; the card then names the repository."""
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo, **o: calls.append((repo, o)))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **o: calls.append(("upload", o)))
    run = class_run(tmp_path)
    answer = run_command("export", run, tmp_path / "quiet", "--num-samples", 0, "--device", "cpu")
    assert (answer.code, answer.out.strip()) == (0, str(tmp_path / "quiet"))
    assert not calls
    answer = run_command("export", run, tmp_path / "out", "--num-samples", 0, "--push", "me/model", "--device", "cpu")
    assert answer.code == 0, answer.err
    assert [name for name, _ in calls] == ["me/model", "upload"]
    assert calls[1][1]["repo_id"] == "me/model"
    assert calls[1][1]["folder_path"] == tmp_path / "out"
    assert "https://huggingface.co/me/model" in answer.err
    assert "snapshot_download('me/model')" in (tmp_path / "out/README.md").read_text()


def test_a_hub_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("401 Unauthorized\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    answer = run_command("export", class_run(tmp_path), tmp_path / "out", "--num-samples", 0, "--push", "me/model")
    assert answer.code == 2
    assert "was written, but me/model did not take it (401 Unauthorized)" in answer.err
    assert (tmp_path / "out/README.md").is_file()


def refused(tmp_path: Path, *words: object) -> str:
    before = sorted(path.name for path in tmp_path.iterdir())
    answer = run_command("export", *words)
    assert (answer.code, answer.out) == (2, ""), answer
    line = answer.err.strip().splitlines()[-1]
    assert line.startswith("fewstep: ")
    assert answer.err.count("fewstep:") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return line


def test_bad_input(tmp_path: Path, teacher_folder: Path) -> None:
    run, out = class_run(tmp_path), tmp_path / "out"
    assert "choose one of diffusers, unet, lora, kohya-lora, single-file, edm" in refused(
        tmp_path, run, out, "--as", "onnx"
    )
    assert "choose fp16, bf16 or fp32" in refused(tmp_path, run, out, "--dtype", "int8")
    assert "does not exist" in refused(tmp_path, tmp_path / "nothing", out)
    assert "without a step schedule" in refused(tmp_path, teacher_folder, out)
    assert f"{run} exists already" in refused(tmp_path, run, run)
    assert "an export is a folder" in refused(tmp_path, run, tmp_path / "model.pkl", "--as", "edm")
    assert "--push a//b" in refused(tmp_path, run, out, "--push", "a//b")
    assert "is a class-conditional generator, which exports as diffusers, edm" in refused(
        tmp_path, run, out, "--as", "lora"
    )
    with small_disk(3_000):
        assert "nothing was left half-written. Free some space" in refused(tmp_path, run, out, "--num-samples", 1)
    run = class_run(tmp_path, golden_denoiser("adm")[0])
    with small_disk(3_000):
        assert "ree some space" in refused(tmp_path, run, out, "--num-samples", 0, "--as", "edm")


def test_bad_input_of_text_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = write_run(tmp_path), tmp_path / "out"
    assert "is a teacher, not a generator" in refused(tmp_path, tmp_path / "teacher", out)
    assert "is a text-to-image generator, which exports as" in refused(tmp_path, run, out, "--as", "edm")
    with small_disk(30_000):
        assert "nothing was left half-written. Free some space" in refused(tmp_path, run, out, "--num-samples", 0)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shareable.shutil, "copyfile", full)
    assert "No space left on device" in refused(tmp_path, run, out, "--num-samples", 0)
    (tmp_path / "teacher").rename(tmp_path / "moved")
    assert f"reads its text encoders and VAE from {tmp_path / 'teacher'}" in refused(tmp_path, run, out)
    monkeypatch.undo()
    answer = run_command("export", run, out, "--base", tmp_path / "moved", "--num-samples", 0, "--as", "unet")
    assert answer.code == 0, answer.err
    assert json.loads((out / "fewstep.json").read_text())["base"] == str(tmp_path / "moved")
