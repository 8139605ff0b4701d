"""What `import fewstep` gives: models that say what they are, make pictures as asked, and refuse in one sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fewstep
from fewstep.diffusion import precision
from fewstep.errors import UserError
from fewstep.formats.model_folder import ModelCard
from fewstep.formats.source import Source
from fewstep.models.model import Model, build_model
from fewstep.settings.python import gather_settings
from tests.conftest import tiny_denoiser
from tests.tiny_models import tiny_sd_folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return fewstep.load_teacher(tiny_sd_folder(tmp_path_factory.mktemp("models") / "sd"), device="cpu")


def generator() -> Model:
    return build_model(tiny_denoiser(), ModelCard("generator", step_indices=(999, 499)))


@pytest.mark.slow
def test_a_bare_string_is_one_prompt(text: Model) -> None:
    (picture,) = text.sample("red cat", num_inference_steps=1)
    assert isinstance(picture, Image.Image)
    assert picture.size == (16, 16)
    assert len(text.sample(["cat", "dog"], num_images=3, num_inference_steps=1)) == 3


def test_classes_take_turns_or_are_named() -> None:
    model = generator()
    tensors = model.sample(5, seed=3, output="tensor")
    assert torch.equal(model.sample(labels=[0, 1, 2, 3, 0], seed=3, output="tensor"), tensors)
    assert torch.equal(model.sample([0, 1, 2, 3, 0], seed=3, output="tensor"), tensors)
    assert torch.equal(model.sample(num_images=5, seed=3, output="tensor"), tensors)
    assert [picture.mode for picture in model.sample(2)] == ["L", "L"]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"seed": -1}, "seed=-1: a seed is a whole number from 0"),
        ({"num_inference_steps": 7}, r"num_inference_steps=7: this generator makes a picture in 2 steps"),
        ({"guidance_scale": 3.0}, r"guidance_scale=3\.0: a generator has its guidance built in"),
        ({"negative_prompt": "cat"}, "negative_prompt: a generator runs without guidance"),
        ({"output": "numpy"}, "output='numpy': choose 'pil' or 'tensor'"),
        ({"what": "cat"}, r"'cat': this model takes no prompts; give class numbers, e\.g\. labels=\[0, 3\]"),
        ({"size": (8, 8)}, "size 8x8: this network was built for 16x16 alone"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_a_generator_refuses_in_one_sentence(how: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        generator().sample(**how)


def test_prompts_are_needed_where_they_are(text: Model) -> None:
    with pytest.raises(UserError, match="this model takes prompts"):
        text.sample(3)
    with pytest.raises(UserError, match="labels are for models with classes"):
        text.sample("cat", labels=[1])


def test_a_model_says_what_it_is(text: Model) -> None:
    assert repr(generator()).startswith(
        "<fewstep generator: EDM, 4 classes, 16x16x1 pictures, 2 steps (999, 499 of 1000)"
    )
    assert "teacher: Stable Diffusion" in repr(text)
    assert text.to(dtype=torch.bfloat16).denoiser.compute_dtype == torch.bfloat16
    text.to(dtype="fp32")


@pytest.mark.parametrize(
    ("words", "hub_id"),
    [
        ("org/name", "org/name"),
        ("./org/name", ""),
        ("runs/mine", ""),
        ("a/b/c", ""),
        ("models/edm.pkl", ""),
        ("~/x", ""),
    ],
)
def test_where_words_lead(words: str, hub_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Source.parse(words).hub_id == hub_id
    (tmp_path / "org/name").mkdir(parents=True)
    assert not Source.parse("org/name").hub_id  # what exists here is never a hub id
    assert Source.parse("bundled:fashion-mnist").exists


def test_settings_from_python(tmp_path: Path) -> None:
    recipe = tmp_path / "a.toml"
    recipe.write_text('teacher.path = "x"\n[training]\nseed = 3\n')
    for given in (recipe, {"teacher": {"path": "x"}, "training.seed": 3}):
        found = gather_settings(fewstep.TrainSettings, given, {"training__num_steps": 7, "run.folder": tmp_path})
        assert (found.training.seed, found.training.num_steps, found.run.folder) == (3, 7, str(tmp_path))
        assert gather_settings(fewstep.TrainSettings, found, {"training__seed": 4}).training.num_steps == 7
    with pytest.raises(UserError, match="unknown setting"):
        gather_settings(fewstep.TrainSettings, recipe, {"training__steps": 7})


def test_names_are_there_at_once() -> None:
    assert set(fewstep.__all__) <= set(dir(fewstep))
    assert all(getattr(fewstep, name).__doc__ for name in fewstep.__all__ if name != "__version__")


def test_sampling_in_float32_is_close(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.diffusion.condition import Condition
    from fewstep.diffusion.samplers import sample_heun

    model, noise = build_model(tiny_denoiser(), ModelCard("teacher")), torch.randn(1, 1, 16, 16)
    condition = Condition.from_labels(torch.tensor([1]), 4)
    exact = sample_heun(model.denoiser, noise, condition, num_steps=3)
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", {"cpu"})
    assert (sample_heun(model.denoiser, noise, condition, num_steps=3) - exact).abs().max() < 1e-3
