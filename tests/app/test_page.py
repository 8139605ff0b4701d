"""The page without a browser: what its functions hand over, what they say when something is wrong, what is shown."""

import logging
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest

from fewstep.app.page import PageFunctions, build_page
from fewstep.app.settings import AppSettings
from fewstep.app.studio import ALL_CLASSES, Request, Studio, load_studio

# gradio makes event loops for its locks and closes none
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
    pytest.mark.usefixtures("_leftovers"),
]
Text = tuple[Path, Path, Path]
Classes = tuple[Path, Path]


def studio(model: Path, **options: Any) -> Studio:
    return load_studio(AppSettings(str(model), device="cpu", **options))


def press(page: Studio, history: list[Any] | None = None, **changes: Any) -> list[tuple[Any, ...]]:
    values = {
        "prompt": "red cat", "label": None, "seed": "5", "num_images": 2, "steps": None, "tiny_vae": False,
        "compare": True, "history": history or [],
    }  # fmt: skip
    return list(PageFunctions(page).generate(**{**values, **changes}))


def components(page: Studio) -> dict[str, dict[str, Any]]:
    config = build_page(page).get_config_file()
    return {part["props"]["elem_id"]: part["props"] for part in config["components"] if part["props"].get("elem_id")}


def test_a_press_shows_pictures_facts_and_history(text: Text) -> None:
    page = studio(text[0], history=3)
    ((problem, shown, facts, teacher, waiting, strip, history),) = press(page)
    assert problem == ""
    assert [caption for _, caption in shown["value"]] == ["picture 0", "picture 1"]
    assert "2 pictures · 2 evaluations each" in facts
    assert (teacher["value"], waiting) == ([], "")
    assert strip is history
    assert [origin for _, origin in history] == [f"red cat · seed 5 · picture {n}" for n in range(2)]
    later = press(page, history, seed="6")[-1][-1]
    assert [origin.split(" · ")[1] for _, origin in later] == ["seed 6", "seed 6", "seed 5"]


def test_the_teacher_comes_second_from_the_same_request(text: Text) -> None:
    page = studio(text[0], teacher=str(text[1]), teacher_steps=2)
    first, second = press(page)
    assert "at work" in first[4]
    assert "2 evaluations each" in second[4]
    expected = page.make(Request(prompt="red cat", seed="5", num_images=2), "teacher").pictures
    for (picture, _), other in zip(second[3]["value"], expected, strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(other))
    assert len(press(page, compare=False)) == 1


def test_generators_ignore_nothing_and_teachers_take_their_steps(classes: Classes) -> None:
    made = press(studio(classes[1]), label=1, steps=7)
    assert "13 evaluations each" in made[0][2]
    assert [caption for _, caption in made[0][1]["value"]] == ["bag", "bag"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": ""}, "Type a prompt first"),
        ({"prompt": None}, "Type a prompt first"),
        ({"seed": "abc"}, "The seed must be a whole number"),
        ({"num_images": 1e30}, "This page makes 1 to 8 pictures"),
        ({"num_images": float("nan")}, "This page makes 1 to 8 pictures"),
    ],
)
def test_wrong_input_is_one_sentence_and_keeps_the_pictures(text: Text, changes: dict[str, Any], sentence: str) -> None:
    ((problem, *others),) = press(studio(text[0]), **changes)
    assert sentence in problem
    assert others == [gr.skip()] * 6


def test_surprises_go_to_the_log(text: Text, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    page = studio(text[0])

    def broken(*_: object) -> None:
        raise RuntimeError("secret details")

    monkeypatch.setattr(page, "make", broken)
    with caplog.at_level(logging.ERROR), pytest.raises(gr.Error) as caught:
        press(page)
    assert caught.value.message == "Something went wrong on the server. Its log says what."
    assert "secret details" in caplog.text


def test_words_in_a_message_stay_text(classes: Classes, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.errors import UserError

    page = studio(classes[0])

    def refuse(*_: object) -> None:
        raise UserError("no <img src=x onerror=alert(1)>")

    monkeypatch.setattr(page, "make", refuse)
    assert press(page)[0][0] == "**no &lt;img src=x onerror=alert(1)&gt;**"


def test_examples_are_prompts_of_the_model(text: Text, classes: Classes, tmp_path: Path) -> None:
    assert studio(classes[0]).examples == []
    (text[0] / "samples").mkdir(exist_ok=True)
    (text[0] / "samples/prompts.txt").write_text("red cat\nred cat\n\na dog\n" + "x" * 90 + "\n")
    assert studio(text[0]).examples == ["red cat", "a dog"]
    shown = [part["props"].get("samples") for part in build_page(studio(text[0])).get_config_file()["components"]]
    assert [["red cat"], ["a dog"]] in shown


def test_notes_are_warnings(text: Text) -> None:
    with pytest.warns(UserWarning, match="26 tokens; the model reads the first 16"):
        press(studio(text[0]), prompt="red cat " * 12)


def test_what_a_text_generator_shows(text: Text) -> None:
    parts = components(studio(text[0], max_images=5, max_prompt=77))
    assert parts["prompt"]["visible"]
    assert parts["prompt"]["max_length"] == 77
    assert parts["count"]["maximum"] == 5
    assert not parts["class"]["visible"]
    assert (parts["steps"]["interactive"], parts["steps"]["choices"]) == (False, [("2", 2)])
    assert not parts["tiny-vae"]["visible"]
    assert not parts["compare"]["visible"]
    assert "No safety checker" in parts["notes"]["value"]


def test_what_other_models_show(text: Text, classes: Classes) -> None:
    parts = components(studio(text[0], teacher=str(text[1]), tiny_vae=str(text[2])))
    assert parts["tiny-vae"]["visible"]
    assert parts["compare"]["visible"]
    parts = components(studio(classes[1]))
    assert not parts["prompt"]["visible"]
    assert parts["class"]["value"] == ALL_CLASSES
    assert [choice[0] for choice in parts["class"]["choices"]][1:] == ["coat", "bag", "boot", "hat"]
    assert parts["steps"]["interactive"]
    assert parts["steps"]["value"] == 18


def test_queue_and_interface_are_closed(classes: Classes) -> None:
    page = build_page(studio(classes[0], max_queue=3))
    assert page._queue.max_size == 3
    assert all(block.concurrency_limit == 1 for block in page.fns.values() if block.name == "generate")
    assert not page.api_open
    (name,) = page.get_api_info()["named_endpoints"]
    assert name == "/generate"
    assert page.analytics_enabled is False
