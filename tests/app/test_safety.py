"""The safety checker of Stable Diffusion 1.x folders, without torchvision: tiny random ones that flag all or nothing."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fewstep.app.notes import notes_of
from fewstep.app.safety import load_safety_checker
from fewstep.app.settings import AppSettings
from fewstep.app.studio import Request, Result, load_studio
from fewstep.errors import UserError
from fewstep.families.registry import family_named
from tests.app.models import add_safety_checker
from tests.tiny_models import tiny_sd_folder

CPU = torch.device("cpu")
KIND = family_named("sd").safety_checker


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_sd_folder(tmp_path / "model")


def page_of(model: Path, **options: bool) -> tuple[Result, list[str]]:
    studio = load_studio(AppSettings(str(model), device="cpu", teacher_steps=2, **options))
    return studio.make(Request(prompt="red cat", num_images=2)), notes_of(studio)


def test_flagged_pictures_are_withheld_and_others_are_not(model: Path) -> None:
    free, notes = page_of(model)
    assert any("No safety checker" in note for note in notes)
    held, notes = page_of(add_safety_checker(model, threshold=-2))
    assert any("Safety checker: on" in note for note in notes)
    assert (held.withheld, held.captions) == (2, ["withheld", "withheld"])
    assert all(np.unique(np.asarray(picture)).tolist() == [128] for picture in held.pictures)
    passed, _ = page_of(add_safety_checker(model, threshold=2))
    assert passed.withheld == 0
    for one, other in zip(passed.pictures, free.pictures, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_it_can_be_switched_off(model: Path) -> None:
    free, notes = page_of(add_safety_checker(model, threshold=-2), safety_checker=False)
    assert free.withheld == 0
    assert any("Safety checker off" in note for note in notes)


def test_flags_follow_the_picture(model: Path) -> None:
    """A threshold between two pictures' scores separates them: the pixels do reach the network."""
    checker = load_safety_checker(KIND, add_safety_checker(model, threshold=2), CPU)
    assert checker is not None
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    pictures = [Image.new("RGB", (40, 40), "red"), Image.fromarray(noise)]
    network = checker.network
    pixels = checker.processor(pictures, return_tensors="pt").pixel_values
    features = network.visual_projection(network.vision_model(pixels)[1])
    cosines = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(network.concept_embeds[:1]).T
    with torch.no_grad():
        network.concept_embeds_weights[0] = cosines.mean()
    assert checker.flagged(pictures) == (cosines[:, 0] > cosines.mean()).tolist()
    assert sum(checker.flagged(pictures)) == 1
    assert checker.flagged([]) == []


def test_a_model_without_one_and_damaged_ones(model: Path) -> None:
    assert load_safety_checker(KIND, model, CPU) is None
    add_safety_checker(model, threshold=2)
    with pytest.raises(UserError, match="has a safety checker, of a kind that is not known for its family"):
        load_safety_checker("", model, CPU)
    weights = model / "safety_checker/model.safetensors"
    whole = load_file(weights)
    save_file({k: v for k, v in whole.items() if k != "concept_embeds"}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing, e\.g\. concept_embeds; repair it, or start without"):
        load_safety_checker(KIND, model, CPU)
    weights.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"safety_checker cannot be loaded .* --no-safety-checker"):
        load_safety_checker(KIND, model, CPU)
    shutil.rmtree(model / "feature_extractor")
    with pytest.raises(UserError, match="has a safety checker, but no feature_extractor"):
        load_safety_checker(KIND, model, CPU)
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(UserError, match=r"has no model\.safetensors \(other formats are not read\)"):
        load_safety_checker(KIND, model, CPU)
    (model / "safety_checker/pytorch_model.bin").unlink()  # the configuration alone is no checker
    assert load_safety_checker(KIND, model, CPU) is None
