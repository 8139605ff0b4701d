"""No command touches the network where no hub id was named: every address but this machine's own is refused and counted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.formats.model_folder import ModelCard, write_model_folder
from tests.cli.test_main import TRAIN_RECIPE
from tests.conftest import tiny_denoiser

GUARD = """
import os, socket
_connect, _resolve = socket.socket.connect, socket.getaddrinfo
_own = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::", None, "")
def _note(address):
    with open(os.environ["ASKED"], "a") as file:
        file.write(f"{address}\\n")
    raise OSError(101, f"refused by the test: {address}")
def connect(self, address):
    return _connect(self, address) if self.family == socket.AF_UNIX or address[0] in _own else _note(address)
def getaddrinfo(host, *arguments, **options):
    return _resolve(host, *arguments, **options) if host in _own else _note(host)
socket.socket.connect = socket.socket.connect_ex = connect
socket.getaddrinfo = getaddrinfo
"""
SERVE = """
import os, sys, threading, time, urllib.request
threading.Thread(target=lambda: (time.sleep(0), ask()), daemon=True).start()
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
sys.argv[0] = "fewstep"
from fewstep.cli.main import main
main()
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
    (tmp_path / "sitecustomize.py").write_text(GUARD)
    asked = tmp_path / "asked"
    source = str(Path(__file__).parents[2] / "src")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "GRADIO_"))}
    environment |= {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{source}", "ASKED": str(asked), "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr, asked.read_text().splitlines() if asked.exists() else []


def test_the_guard_notices(tmp_path: Path) -> None:
    script = "import urllib.request\ntry: urllib.request.urlopen('http://example.org')\nexcept OSError: pass"
    assert alone(tmp_path, "-c", script)[1] == ["example.org"]


@pytest.mark.slow
def test_nobody_is_asked(teacher: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(TRAIN_RECIPE.replace("tensorboard = false", "tensorboard = true"))
    place = [f"teacher.path={teacher}", f"data.images={pictures}", "run.folder=run"]
    assert alone(tmp_path, "-m", "fewstep", "train", "recipe.toml", *place)[1] == []
    grid = ["--num-images", 2, "--grid", "g.png", "--device", "cpu"]
    assert alone(tmp_path, "-m", "fewstep", "sample", "run", *grid)[1] == []
    evaluate = [
        "--features",
        "bundled:fashion-mnist",
        "--images",
        pictures,
        "--fit",
        "pad",
        "--num-images",
        4,
        "--device",
        "cpu",
    ]
    said, asked = alone(tmp_path, "-m", "fewstep", "evaluate", "bundled:fashion-mnist", "--teacher-steps", 1, *evaluate)
    assert asked == [], said


@pytest.mark.slow
def test_the_page_asks_nobody(teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    (tmp_path / "serve.py").write_text(SERVE)
    said, asked = alone(tmp_path, "serve.py", "app", teacher, "--teacher-steps", 1, "--device", "cpu", "--port", 7893)
    assert "served" in said
    assert asked == []
