"""Requests to pictures: the pixels of `fewstep sample`, the limits, and every sentence a visitor or operator can meet."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.app.notes import about_model, comparison_of, facts_of, notes_of
from fewstep.app.settings import AppSettings
from fewstep.app.studio import ALL_CLASSES, Request, Result, Studio, load_studio
from fewstep.errors import UserError
from fewstep.formats.model_folder import ModelCard, write_model_folder
from fewstep.models.sampling import SampleOptions, sample_pictures
from tests.conftest import tiny_denoiser
from tests.tiny_models import tiny_taesd_folder

Text = tuple[Path, Path, Path]
Classes = tuple[Path, Path]


def studio(model: Path, **options: Any) -> Studio:
    return load_studio(AppSettings(str(model), device="cpu", **options))


def sampled(model: Path, out: Path, **options: Any) -> list[np.ndarray]:
    sample_pictures(str(model), SampleOptions(out=out, device="cpu", **options))
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(out.glob("*.png"))]


def same(result: Result, expected: list[np.ndarray]) -> bool:
    return len(expected) == len(result.pictures) and all(
        np.array_equal(np.asarray(picture), other) for picture, other in zip(result.pictures, expected, strict=True)
    )


def test_text_pictures_are_those_of_sample(text: Text, tmp_path: Path) -> None:
    run, teacher, _ = text
    page = studio(run, teacher=str(teacher), teacher_steps=3, guidance_scale=2.0)
    request = Request(prompt="red cat", seed="5", num_images=3)
    made = page.make(request)
    assert same(made, sampled(run, tmp_path / "a", prompts=("red cat",), seed=5, num_images=3))
    assert (made.evaluations, made.captions[1], made.origins[2]) == (2, "picture 1", "red cat · seed 5 · picture 2")
    options: dict[str, Any] = {"prompts": ("red cat",), "seed": 5, "num_images": 3}
    beside = page.make(request, "teacher")
    assert same(beside, sampled(teacher, tmp_path / "b", teacher_steps=3, guidance_scale=2.0, **options))
    assert beside.evaluations == 3
    assert not same(page.make(Request(prompt="red cat", seed="6", num_images=3)), [*map(np.asarray, made.pictures)])
    assert not same(page.make(Request(prompt="a dog", seed="5", num_images=3)), [*map(np.asarray, made.pictures)])


def test_a_teacher_alone_has_the_defaults_of_sample(text: Text, tmp_path: Path) -> None:
    _, teacher, _ = text
    page = studio(teacher)
    assert page.step_choices == [20, 50, 100]
    made = page.make(Request(prompt="red cat", num_images=1))
    assert same(made, sampled(teacher, tmp_path, prompts=("red cat",), num_images=1))
    assert made.evaluations == 50
    assert page.make(Request(prompt="red cat", num_steps=20)).evaluations == 20
    with pytest.raises(UserError, match=r"Choose one of \[20, 50, 100\] steps"):
        page.make(Request(prompt="red cat", num_steps=21))


def test_class_pictures_are_those_of_sample(classes: Classes, tmp_path: Path) -> None:
    generator, teacher = classes
    page = studio(generator, teacher=str(teacher))
    assert page.classes == [("all classes in turn", ALL_CLASSES), ("coat", 0), ("bag", 1), ("boot", 2), ("hat", 3)]
    made = page.make(Request(label=2, seed="9", num_images=2))
    assert same(made, sampled(generator, tmp_path / "a", labels="2", seed=9, num_images=2))
    assert made.captions == ["boot", "boot"]
    beside = page.make(Request(label=2, seed="9", num_images=2), "teacher")
    assert same(beside, sampled(teacher, tmp_path / "b", labels="2", seed=9, num_images=2))
    assert beside.evaluations == 35
    turns = page.make(Request(seed="9", num_images=5))
    assert turns.captions == ["coat", "bag", "boot", "hat", "coat"]
    assert same(turns, sampled(generator, tmp_path / "c", seed=9, num_images=5))


def test_the_tiny_vae_can_be_switched_on_and_off(text: Text, tmp_path: Path) -> None:
    run, _, taesd = text
    page = studio(run, tiny_vae=str(taesd))
    full = page.make(Request(prompt="red cat"))
    tiny = page.make(Request(prompt="red cat", tiny_vae=True))
    options: dict[str, Any] = {"prompts": ("red cat",), "num_images": 1}
    assert same(full, sampled(run, tmp_path / "a", **options))
    assert same(tiny, sampled(run, tmp_path / "b", tiny_vae=str(taesd), **options))
    assert not same(tiny, [np.asarray(full.pictures[0])])
    assert same(page.make(Request(prompt="red cat")), [np.asarray(full.pictures[0])])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": "  "}, "Type a prompt first"),
        ({"prompt": "cat " * 20}, "The prompt has 80 characters; this page takes 60"),
        ({"prompt": "cat \ud800"}, "The prompt holds half a character"),
        ({"seed": "abc"}, "The seed must be a whole number from 0 to 18446744073709551615"),
        ({"seed": ""}, "The seed must be"),
        ({"seed": "-1"}, "The seed must be"),
        ({"seed": "1.5"}, "The seed must be"),
        ({"seed": "٣"}, "The seed must be"),
        ({"seed": str(2**64)}, "The seed must be"),
        ({"num_images": 0}, "This page makes 1 to 3 pictures a request"),
        ({"num_images": 4}, "This page makes 1 to 3 pictures a request"),
        ({"num_images": True}, "This page makes 1 to 3 pictures a request"),
        ({"num_steps": 4}, "A generator runs in the steps it was trained for, and no others"),
        ({"tiny_vae": True}, "This page was started without a tiny VAE"),
    ],
)
def test_what_a_visitor_is_told(text: Text, changes: dict[str, Any], sentence: str) -> None:
    page = studio(text[0], max_images=3, max_prompt=60)
    with pytest.raises(UserError, match=sentence):
        page.make(Request(**{"prompt": "red cat", **changes}))


def test_classes_that_are_not_there(classes: Classes) -> None:
    with pytest.raises(UserError, match="The model has no class 4"):
        studio(classes[0]).make(Request(label=4))
    assert studio(classes[0]).make(Request(seed=str(2**64 - 1))).pictures[0].size == (16, 16)


def test_long_prompts_are_cut_with_a_note(text: Text) -> None:
    made = studio(text[0]).make(Request(prompt="red cat " * 12))
    assert made.notes == ("The prompt has 26 tokens; the model reads the first 16.",)


def test_a_full_memory_and_broken_weights_are_one_sentence(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    page = studio(text[0])

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("a long tale")

    monkeypatch.setattr(page.models["model"], "sample", full)
    with pytest.raises(UserError, match="The GPU's memory is full: ask for fewer pictures"):
        page.make(Request(prompt="red cat"))
    monkeypatch.setattr(page.models["model"], "sample", lambda *_, **__: torch.full((1, 3, 16, 16), torch.nan))
    with pytest.raises(UserError, match="came out as NaN"):
        page.make(Request(prompt="red cat"))


def test_what_an_operator_is_told(text: Text, classes: Classes, tmp_path: Path) -> None:
    (run, teacher, taesd), (generator, class_teacher) = text, classes
    wide = tiny_denoiser(num_classes=3)
    write_model_folder(tmp_path / "three", wide.describe(), wide.state_dict(), ModelCard("teacher"))
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (class_teacher, {"teacher": str(class_teacher)}, "the model is a teacher itself"),
        (generator, {"teacher": str(generator)}, "is a generator; give the model it was distilled from"),
        (generator, {"teacher": str(teacher)}, "one of the two is a text-to-image model"),
        (generator, {"teacher": str(tmp_path / "three")}, "has other classes than the generator"),
        (generator, {"teacher": "bundled:fashion-mnist"}, "makes pictures of another size"),
        (generator, {"teacher_steps": 4}, "--teacher-steps is for a teacher"),
        (generator, {"guidance_scale": 2.0}, "a generator has its guidance built in"),
        (generator, {"tiny_vae": str(taesd)}, "--tiny-vae: a TAESD .* is for text-to-image models"),
        (run, {"tiny_vae": str(tiny_taesd_folder(tmp_path / "taesd3", latent_channels=16))}, "--tiny-vae: .*channels"),
        (run, {"tiny_vae": str(tmp_path)}, "--tiny-vae: .*config.json is missing"),
        (teacher, {"teacher_steps": 1001}, "has 1000 noise levels"),
        (run, {"precision": "fp8"}, "--precision fp8: choose auto, fp32, bf16 or fp16"),
        (tmp_path / "nothing", {}, "does not exist"),
    ]
    for model, options, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            studio(model, **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"port": 70000}, "--port 70000: must lie between 0 and 65535"),
        ({"max_images": 0}, "--max-images 0"),
        ({"max_queue": 0}, "--max-queue 0"),
        ({"max_prompt": 0}, "--max-prompt 0"),
        ({"history": -1}, "--history -1"),
        ({"teacher_steps": 0}, "--teacher-steps 0"),
        ({"host": ""}, "--host is empty"),
    ],
)
def test_settings_outside_their_limits(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        AppSettings("model", **options)


def test_the_sentences_on_the_page(text: Text, classes: Classes) -> None:
    run, teacher, taesd = text
    notes = " ".join(notes_of(studio(run)))
    for part in ("No negative prompt", "No safety checker", "Tiny VAE: none was given", "`fewstep sample --seed`"):
        assert part in notes
    notes = " ".join(notes_of(studio(run, tiny_vae=str(taesd), teacher=str(teacher), safety_checker=False)))
    assert "Safety checker off" in notes
    assert "none was given" not in notes
    assert "from the same noise" in notes
    page = studio(classes[0])
    assert "afety" not in " ".join(notes_of(page))
    assert "2 steps (grid 999, 499 of 1000)" in about_model(page)
    assert str(classes[0].parent) not in about_model(page)
    cold, warm = page.make(Request()), page.make(Request())
    assert "first run, warm-up included" in facts_of(cold)
    assert facts_of(warm).startswith("1 picture · 2 evaluations each · **")
    assert "faster" in comparison_of(warm, warm)
    assert "faster" not in comparison_of(cold, warm)
