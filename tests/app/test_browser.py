"""The page in a real headless Chromium, served by the real command; nothing but this machine may be asked for anything."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.app.models import add_safety_checker, text_models
from tests.network_guard import asked, guarded

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium"),
]
COMMAND = "import sys; from fewstep.cli.main import main; sys.argv[0] = 'fewstep'; main()"
WAIT = 120_000  # ms; a busy machine is slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and log of `fewstep app` on a text generator with its teacher and a TAESD."""
    folder = tmp_path_factory.mktemp("browser")
    run, teacher, taesd = text_models(folder)
    add_safety_checker(teacher, threshold=2)
    log = folder / "log"
    arguments = [
        "app", str(run), "--teacher", str(teacher), "--teacher-steps", "2", "--tiny-vae", str(taesd), "--port", "0",
        "--max-images", "3", "--device", "cpu",
    ]  # fmt: skip
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True,
            env=guarded(folder),
        )  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("fewstep app: http://127.0.0.1:"), line + log.read_text()
        yield line.split()[2], log
        process.terminate()
        process.communicate(timeout=60)
    assert asked(folder) == []


@pytest.fixture
def page(server: tuple[str, Path]) -> Iterator[Any]:
    """The page, in a browser that reaches 127.0.0.1 only; anything else it asks for fails the test."""
    from playwright.sync_api import sync_playwright

    strangers: list[str] = []
    problems: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-dev-shm-usage",
                "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            ],
        )
        tab = browser.new_page(viewport={"width": 1200, "height": 900})

        def guard(route: Any) -> None:
            if route.request.url.startswith((server[0], "data:", "blob:")):
                route.continue_()
            else:
                strangers.append(route.request.url)
                route.abort()

        tab.route("**/*", guard)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.goto(server[0])
        tab.locator("#generate").wait_for(timeout=WAIT)
        yield tab
        browser.close()
    assert strangers == []
    assert problems == []


def generate(page: Any, seed: str, prompt: str = "red cat") -> tuple[list[str], list[str]]:
    """Press the button; the addresses of the generator's and the teacher's pictures (named by their content)."""
    before = page.locator("#history img").count()
    page.fill("#prompt textarea", prompt)
    page.fill("#seed textarea", seed)
    page.click("#generate")
    page.locator("#history img").nth(before + 2).wait_for(timeout=WAIT)
    page.locator(f"#history img[alt^='{prompt} · seed {seed} ']").first.wait_for(timeout=WAIT)
    page.get_by_text("The teacher is at work").wait_for(state="detached", timeout=WAIT)
    page.locator("#teacher img").first.wait_for(timeout=WAIT)
    return tuple(
        [image.get_attribute("src").split("/")[-2] for image in page.locator(f"#{name} img").all()]
        for name in ("model", "teacher")
    )  # type: ignore[return-value]


def test_prompt_and_seed_make_pictures(page: Any, server: tuple[str, Path]) -> None:
    """Another seed or prompt is another picture, the same ones are the same; teacher, latency and history are there."""
    pictures, beside = generate(page, "1")
    assert len(pictures) == len(beside) == 3
    assert len({*pictures, *beside}) == 6
    loaded = "element => element.complete && element.naturalWidth"
    assert page.locator("#model img").first.evaluate(loaded) == 16
    for name in ("#model-facts", "#teacher-facts"):
        assert "3 pictures · 2 evaluations each" in page.locator(name).inner_text()
        assert re.search(r"\d\sm?s\b", page.locator(name).inner_text())
    other, _ = generate(page, "2")
    assert not {*other} & {*pictures}
    another, _ = generate(page, "2", "a dog")
    assert not {*another} & {*other}
    assert generate(page, "1") == (pictures, beside)
    assert page.locator("#history img").count() == 12
    page.get_by_label("Tiny VAE").check()
    tiny, _ = generate(page, "4")
    page.get_by_label("Tiny VAE").uncheck()
    full, _ = generate(page, "4")
    assert not {*tiny} & {*full}
    page.click("#new-seed")
    page.wait_for_function("() => document.querySelector('#seed textarea').value != '4'", timeout=WAIT)
    assert "Traceback" not in server[1].read_text()


def test_wrong_input_is_a_message(page: Any, server: tuple[str, Path]) -> None:
    for prompt, seed, sentence in [
        ("red cat", "abc", "The seed must be a whole number"), ("", "1", "Type a prompt first")
    ]:  # fmt: skip
        page.fill("#prompt textarea", prompt)
        page.fill("#seed textarea", seed)
        page.click("#generate")
        page.locator("#problem").get_by_text(sentence).wait_for(timeout=WAIT)
        assert "Traceback" not in page.locator("body").inner_text() + server[1].read_text()
        assert page.locator("#model img").count() == 0
    pictures, _ = generate(page, "3")  # the page goes on
    assert len(pictures) == 3


def test_what_the_page_says(page: Any) -> None:
    text = page.locator("body").inner_text()
    for part in ("No negative prompt", "Safety checker: on", "start from the same noise", "as trained"):
        assert part in text
    assert page.locator("#steps input").is_disabled()
    assert not page.locator("#class").is_visible()


def test_enter_generates_and_wrong_input_keeps_the_pictures(page: Any) -> None:
    page.fill("#seed textarea", "7")
    page.fill("#prompt textarea", "red")
    page.locator("#prompt textarea").press("Shift+Enter")
    page.locator("#prompt textarea").press_sequentially("cat")
    assert page.locator("#prompt textarea").input_value() == "red\ncat"
    page.locator("#prompt textarea").press("Enter")
    page.locator("#teacher img").first.wait_for(timeout=WAIT)
    page.get_by_text("The teacher is at work").wait_for(state="detached", timeout=WAIT)
    before = [image.get_attribute("src") for image in page.locator("#model img").all()]
    page.fill("#seed textarea", "abc")
    page.click("#generate")
    page.locator("#problem").get_by_text("The seed must be a whole number").wait_for(timeout=WAIT)
    assert [image.get_attribute("src") for image in page.locator("#model img").all()] == before != []
    generate(page, "8")
    assert page.locator("#problem").inner_text().strip() == ""


def test_a_press_while_pictures_are_being_made_is_not_lost(page: Any) -> None:
    """Whoever changes the seed and presses again before the first answer is there gets both, the last press last."""
    page.fill("#prompt textarea", "red cat")
    for seed in ("21", "22", "23"):
        page.fill("#seed textarea", seed)
        page.click("#generate", no_wait_after=True)
    for seed in ("21", "23"):
        page.locator(f"#history img[alt^='red cat · seed {seed} ']").first.wait_for(timeout=WAIT)
    page.get_by_text("The teacher is at work").wait_for(state="detached", timeout=WAIT)
    assert "seed 23 " in page.locator("#history img").first.get_attribute("alt")


def test_a_program_asks_the_named_endpoint(server: tuple[str, Path]) -> None:
    """As docs/app.md shows it."""
    from gradio_client import Client

    client = Client(server[0], verbose=False)
    made = client.predict("red cat", -1, "5", 2, api_name="/generate")
    assert [entry["caption"] for entry in made] == [f"red cat · seed 5 · picture {number}" for number in range(2)]
    assert all(Path(entry["image"]).read_bytes().startswith(b"\x89PNG") for entry in made)
    with pytest.raises(Exception, match="The seed must be a whole number"):
        client.predict("red cat", -1, "abc", 2, api_name="/generate")
