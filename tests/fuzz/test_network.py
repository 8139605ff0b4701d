"""No command touches the network where no hub id was named: every address but this machine's own is refused and counted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.formats.model_folder import ModelCard, write_model_folder
from tests.cli.test_main import TRAIN_RECIPE
from tests.conftest import tiny_denoiser
from tests.network_guard import asked, guarded

SERVE = """
import os, sys, threading, time, urllib.request
def ask():
    for _ in range(600):
        time.sleep(0.1)
        try:
            page = urllib.request.urlopen("http://127.0.0.1:%s/" % sys.argv[-1], timeout=5).read()
        except OSError:
            continue
        print("served", len(page), flush=True)
        time.sleep(1)  # what a page asks for in the background
        os._exit(0)
    os._exit(3)
threading.Thread(target=ask, daemon=True).start()
sys.argv[0] = "fewstep"
from fewstep.cli.main import main
main()
"""
ONE_BY_ONE = """
import json, sys
from fewstep.cli.main import main
commands = json.loads(sys.argv[1])
for command in commands:
    sys.argv = ["fewstep", *command]
    try:
        main()
    except SystemExit as end:
        assert not end.code, command
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "teacher"
    denoiser = tiny_denoiser()
    card = ModelCard(role="teacher", class_names=tuple(f"class{i}" for i in range(4)), can_be_guided=True)
    write_model_folder(folder, denoiser.describe(), denoiser.state_dict(), card)
    return folder


def alone(tmp_path: Path, *command: object) -> tuple[str, list[str]]:
    """(what a command said, addresses it asked for) without a word to it that it is offline."""
    words, environment = [sys.executable, *map(str, command)], guarded(tmp_path)
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr, asked(tmp_path)


@pytest.mark.slow
def test_the_guard_notices(tmp_path: Path) -> None:
    script = "import urllib.request\ntry: urllib.request.urlopen('http://example.org')\nexcept OSError: pass"
    assert alone(tmp_path, "-c", script)[1] == ["example.org"]


@pytest.mark.slow
def test_nobody_is_asked(teacher: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(TRAIN_RECIPE.replace("tensorboard = false", "tensorboard = true"))
    train = ["train", "recipe.toml", f"teacher.path={teacher}", f"data.images={pictures}", "run.folder=run"]
    sample = ["sample", "run", "--num-images", 2, "--grid", "g.png", "--device", "cpu"]
    evaluate = [
        "evaluate", "bundled:fashion-mnist", "--teacher-steps", 1, "--features", "bundled:fashion-mnist", "--images", pictures,
        "--fit", "pad", "--num-images", 6, "--device", "cpu",
    ]  # fmt: skip
    commands = [[str(word) for word in command] for command in (train, sample, evaluate)]
    said, addresses = alone(tmp_path, "-c", ONE_BY_ONE, json.dumps(commands))
    assert addresses == [], said
    assert (tmp_path / "g.png").is_file()


@pytest.mark.long  # the server of tests/app/test_browser.py is watched in the same way
def test_the_page_asks_nobody(teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    (tmp_path / "serve.py").write_text(SERVE)
    said, addresses = alone(
        tmp_path, "serve.py", "app", teacher, "--teacher-steps", 1, "--device", "cpu", "--port", 7893
    )
    assert "served" in said
    assert addresses == []
