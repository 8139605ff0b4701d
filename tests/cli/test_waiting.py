"""Nobody waits without a sign of life, and Ctrl-C ends every command with one sentence: real processes, slowed down."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SECONDS = 2.0  # longest silence
SLOW = 4.0  # seconds of each slowed piece of work

ENTRY = "from fewstep.__main__ import main; main()"
SLOWED = f"""
import sys, time
import fewstep.estimate.describe, fewstep.evaluation.evaluate, fewstep.models.sampling, fewstep.training.run
from fewstep import __main__ as entry
from fewstep.models.model import Model
from fewstep.training import distill, generator_job, run

def slowed(module, name):
    original = getattr(module, name)
    def slow(*arguments, **options):
        time.sleep({SLOW})
        return original(*arguments, **options)
    setattr(module, name, slow)

slowed(fewstep.models.sampling, "load_model")
slowed(fewstep.evaluation.evaluate, "load_features")
slowed(run, "open_teacher")
slowed(distill, "build_distillation")
slowed(distill, "two_time_scale_step")
slowed(generator_job, "sample_generator")
slowed(fewstep.estimate.describe, "estimate_run")
original = Model.sample
def sample(self, *arguments, **options):
    time.sleep({SLOW})
    return original(self, *arguments, **options)
Model.sample = sample
print("ready", flush=True)
sys.argv = ["fewstep", *sys.argv[1:]]
entry.main()
"""

RECIPE = """
[training]
num_steps = 100000
batch_size = 2
[compute]
device = "cpu"
precision = "fp32"
[run]
sample_images = 2
sample_every = 1000
checkpoint_every = 2
"""


def gaps_on_a_terminal(code: str, *words: object, after: bytes) -> tuple[int, list[float], str]:
    """(exit code, seconds between two outputs, everything) of a command on a terminal; b"" counts from its start, its imports too."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", code, *map(str, words)]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        seen, gaps, last = b"", list[float](), time.monotonic()
        while True:
            readable, _, _ = select.select([ours], [], [], 120)
            assert readable, seen.decode()
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other side is closed
                part = b""
            now = time.monotonic()
            if not part:
                break
            if after in seen:
                gaps.append(now - last)
            last = now
            seen += part
        code_of_exit = process.wait(timeout=180)
    os.close(ours)
    return code_of_exit, gaps, seen.decode()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    return tmp_path / "tiny.toml"


@pytest.mark.long  # by the clock, so on a machine that does nothing else
@pytest.mark.parametrize("after", [b"", b"ready"], ids=["from the start", "slowed"])
def test_no_command_is_silent(after: bytes, teacher_folder: Path, pictures: Path, recipe: Path, tmp_path: Path) -> None:
    commands = [
        ["sample", teacher_folder, "--num-images", 2, "--teacher-steps", 2, "--grid", tmp_path / "a.png", "--device", "cpu"],
        [
            "train", recipe, f"teacher.path={teacher_folder}", f"run.folder={tmp_path / 'run'}", "training.num_steps=1",
        ],
        ["train", recipe, "teacher.path=bundled:fashion-mnist", "--dry-run"],
    ]  # fmt: skip
    for words in commands:
        code, gaps, seen = gaps_on_a_terminal(SLOWED if after else ENTRY, *words, after=after)
        assert code == 0, seen
        assert max(gaps) < SECONDS, f"{words[0]} was silent for {max(gaps):.1f} s: {seen[-500:]}"


def start(code: str, *words: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background jobs begin without Ctrl-C
    )  # fmt: skip


def interrupted(process: "subprocess.Popen[str]", by: int = signal.SIGINT) -> tuple[int, str]:
    """Exit code and last line after a signal, which must end the process within seconds."""
    process.send_signal(by)
    _, err = process.communicate(timeout=180)
    assert "Traceback" not in err
    return process.returncode, err.splitlines()[-1]


SLOW_IMPORT = f"""
import importlib.abc, sys, time
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "fewstep.cli.main":
            print("slow", file=sys.stderr, flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
{ENTRY}
"""


def wait_for_slow(process: "subprocess.Popen[str]") -> None:
    """Until the process says that it is where it stays."""
    assert process.stderr is not None
    while process.stderr.readline().strip() not in ("slow", ""):
        pass


@pytest.mark.parametrize(("number", "end"), [(signal.SIGINT, (130, "Ctrl-C")), (signal.SIGTERM, (143, "SIGTERM"))])
def test_signals_while_libraries_are_imported(number: int, end: tuple[int, str]) -> None:
    process = start(SLOW_IMPORT, "--version")
    wait_for_slow(process)
    assert interrupted(process, number) == (end[0], f"fewstep: stopped by {end[1]}")


@pytest.mark.slow
def test_ctrl_c_in_a_run_names_checkpoint_and_command(teacher_folder: Path, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["train", recipe, f"teacher.path={teacher_folder}", f"run.folder={folder}"]
    process = start(ENTRY, *words)
    end = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("step_*")) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.1)
    code, line = interrupted(process)
    assert code == 130
    assert line.startswith("fewstep: stopped by Ctrl-C after ")
    assert f"everything is saved in {folder / 'checkpoints'}" in line
    assert line.endswith(f"Continue with: fewstep {' '.join(map(str, words))}")


@pytest.mark.slow
def test_signals_before_the_first_step(teacher_folder: Path, recipe: Path, tmp_path: Path) -> None:
    """While the teacher is loaded there is no checkpoint; a command that does not continue says what stopped it."""
    slow = SLOWED.replace(f"time.sleep({SLOW})", "print('slow', file=sys.stderr, flush=True); time.sleep(60)")
    process = start(slow, "train", recipe, f"teacher.path={teacher_folder}", f"run.folder={tmp_path / 'run'}")
    wait_for_slow(process)
    code, line = interrupted(process, signal.SIGTERM)
    assert (code, line.partition(". Continue")[0]) == (143, "fewstep: stopped by SIGTERM; there is no checkpoint yet")
    process = start(slow, "sample", teacher_folder, "--grid", tmp_path / "a.png")
    wait_for_slow(process)
    assert interrupted(process) == (130, "fewstep: stopped by Ctrl-C")
