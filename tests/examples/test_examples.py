"""Every example runs as it stands, on tiny models, and does what its first line says."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.evaluation.features import SmallClassifier
from fewstep.export.export import ExportOptions, export_generator
from fewstep.formats.model_folder import ModelCard, write_model_folder
from fewstep.formats.pixels import make_grid
from fewstep.models.load import load_generator, load_teacher
from fewstep.networks.adapters import LoraShape
from tests.conftest import tiny_denoiser, write_pictures
from tests.dmd2_files import edm_network, head_for, save_dmd2
from tests.export.text_generators import load, write_run

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN_HERE = {
    "convert_checkpoint", "export_generator", "sample_generator", "use_in_diffusers", "use_lora_in_diffusers",
    "use_pipeline", "image_to_image", "distil_folder", "evaluate_generator",
}  # fmt: skip
PIPELINE = ExportOptions(precision="fp32", num_samples=0, device="cpu")


def script(name: str) -> ModuleType:
    assert name in RUN_HERE
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: object) -> None:
    script(name).main([str(argument) for argument in arguments])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=int)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, denoiser = tmp_path_factory.mktemp("classes") / "generator", tiny_denoiser(seed=3)
    card = ModelCard(role="generator", step_indices=(999, 499))
    write_model_folder(folder, denoiser.describe(), denoiser.state_dict(), card)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a two-step LoRA generator; its teacher lies beside it."""
    return write_run(tmp_path_factory.mktemp("text"), "sd", (999, 499), LoraShape(4, 2.0))


@pytest.fixture(scope="module")
def pipeline(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_generator(text, tmp_path_factory.mktemp("exported") / "pipeline", PIPELINE)


def test_every_example_is_listed_and_explained() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert path.name in table or path.name.startswith("emoji_"), path
    for name in RUN_HERE:
        source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert re.search(rf"^python examples/{name}\.py ", source, flags=re.MULTILINE)
        assert len(source.splitlines()) <= 50
    for name in re.findall(r"\]\((\w+\.py)\)", table):
        assert (EXAMPLES / name).is_file(), name


def test_converting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_dmd2(tmp_path / "x_checkpoint_model_1", edm_network(0), edm_network(1), head_for(edm_network(1)))
    run("convert_checkpoint", source, tmp_path / "out", "--steps", 999, 499)
    generator = load_generator(tmp_path / "out", device="cpu")
    assert generator.card.step_indices == (999, 499)
    assert torch.equal(
        generator.denoiser.state_dict()["model.out_conv.weight"], edm_network(0).state_dict()["model.out_conv.weight"]
    )
    assert "generator, 3x16x16 pictures" in capsys.readouterr().out


def test_exporting_every_form(text: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("export_generator", text, tmp_path / "text", "--samples", 1, "--dtype", "fp32")
    lines = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "text").iterdir()} >= {"diffusers", "unet", "lora", "kohya-lora"}
    assert "not as edm: " in lines
    run("export_generator", classes, tmp_path / "classes", "--samples", 1)
    assert [path.name for path in (tmp_path / "classes").iterdir()] == ["diffusers"]
    assert "not as edm: " in capsys.readouterr().out  # the tiny network is none of EDM's


def test_sampling_prompts_and_classes(text: Path, classes: Path, tmp_path: Path) -> None:
    run("sample_generator", text, tmp_path / "text.png", "--prompts", "red cat", "a dog", "--seed", 3)
    expected = make_grid(load(text).sample(["red cat", "a dog"], seed=3, output="tensor"), columns=2)
    assert np.array_equal(pixels(tmp_path / "text.png"), np.asarray(expected))
    run("sample_generator", classes, tmp_path / "classes.png", "--labels", 3, 1)
    model = load_generator(classes, device="cpu")
    assert model.is_generator
    assert np.array_equal(
        pixels(tmp_path / "classes.png"), np.asarray(make_grid(model.sample(2, labels=[3, 1], output="tensor"), 2))
    )


def test_exports_in_diffusers(text: Path, pipeline: Path, tmp_path: Path, same_noise: Callable[[int], Any]) -> None:
    """The pipeline and the LoRA on its base make the same picture from the same noise."""
    same_noise(5)
    run("use_in_diffusers", pipeline, "red cat", tmp_path / "a.png", "--steps", 2)
    lora = export_generator(text, tmp_path / "lora", ExportOptions(kind="lora", precision="fp32", num_samples=0))
    same_noise(5)
    run("use_lora_in_diffusers", text.parent / "teacher", lora, "red cat", tmp_path / "b.png", "--steps", 2)
    assert pixels(tmp_path / "a.png").shape == (16, 16, 3)
    assert pixels(tmp_path / "a.png").std() > 5
    assert np.abs(pixels(tmp_path / "a.png") - pixels(tmp_path / "b.png")).max() <= 1


@pytest.fixture
def same_noise() -> Callable[[int], Any]:
    """diffusers draws from torch's own generator where it is given none."""
    return torch.manual_seed


def test_pipelines_without_steps(classes: Path, pipeline: Path, tmp_path: Path) -> None:
    run("use_pipeline", pipeline, tmp_path / "text.png", "--prompt", "red cat")
    assert pixels(tmp_path / "text.png").std() > 5
    run("use_pipeline", classes, tmp_path / "class.png", "--label", 2)
    model = load_generator(classes, device="cpu")
    assert model.is_generator
    assert np.array_equal(
        pixels(tmp_path / "class.png"), np.asarray(make_grid(model.sample(1, labels=[2], output="tensor"), 1))
    )


def test_image_to_image(pipeline: Path, tmp_path: Path, same_noise: Callable[[int], Any]) -> None:
    """At strength 1 the start is gone; at half of it, it shapes the picture."""
    made = {}
    for strength in ("0.5", "1"):
        for shade in (30, 220):
            Image.new("RGB", (16, 16), (shade, shade, shade)).save(tmp_path / "start.png")
            same_noise(1)
            out = tmp_path / f"{strength}-{shade}.png"
            run("image_to_image", pipeline, tmp_path / "start.png", "cat", out, "--steps", 2, "--strength", strength)
            made[strength, shade] = pixels(out)
    change = {strength: np.abs(made[strength, 30] - made[strength, 220]).mean() for strength in ("0.5", "1")}
    assert change["0.5"] > 2 * change["1"]


def test_distilling_a_folder(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", channels=3)
    run(
        "distil_folder", pictures, tmp_path / "out", "network.name=tiny", "network.img_resolution=16", "--both",
        "training.num_steps=2", "training.batch_size=4", "compute.precision=fp32",
        "compute.device=cpu", "run.sample_images=4",
    )  # fmt: skip
    generator = load_generator(tmp_path / "out/generator", device="cpu")
    assert generator.is_generator
    assert load_teacher(tmp_path / "out/teacher", device="cpu").picture_shape == (3, 16, 16)
    expected = make_grid(generator.sample(16, output="tensor"), columns=4)
    assert np.array_equal(pixels(tmp_path / "out/generator.png"), np.asarray(expected))


def test_evaluating(classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    SmallClassifier(channels=1, num_classes=4, width=4, name="four classes").eval().save(tmp_path / "net")
    pictures = write_pictures(tmp_path / "pictures")
    run("evaluate_generator", classes, tmp_path / "net", pictures, "--num-images", 12)
    line = capsys.readouterr().out
    assert re.search(
        r"Frechet distance \d+\.\d+ ± \d+\.\d+, (?:KID [^,]+, )?precision [01]\.\d+ ± \d\.\d+, recall [01]\.\d+ ± [^,]+, density \d+\.\d+ ± [^,]+, coverage [01]\.\d+ ± \d\.\d+ \(12 images against 24 real",
        line,
    )
