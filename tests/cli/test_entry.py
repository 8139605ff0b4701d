"""How the command line begins and ends: examples, recipes at hand, faults, Ctrl-C, silence towards the network."""

import errno
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import typer.main
from typer.testing import CliRunner

from fewstep.cli import main as entry
from fewstep.cli import quickstart as quickstarts
from fewstep.cli.examples import EXAMPLES
from fewstep.cli.main import app
from fewstep.errors import RunInterrupted, Terminated, UserError
from fewstep.models import sampling as commands_sample
from fewstep.settings import TrainSettings
from fewstep.training.run_folder import run_folder
from tests.cli.test_main import Answer, fewstep

ROOT = Path(__file__).parents[2]


def commands() -> dict[str, list[str]]:
    group = typer.main.get_command(app)
    found = {name: [name] for name in group.commands if name != "prepare"}
    return found | {name: ["prepare", name] for name in group.commands["prepare"].commands}


@pytest.mark.parametrize(
    ("error", "is_shown"), [(OSError(errno.EFBIG, "File too large"), False), (ValueError("no"), True)]
)
def test_a_thread_on_a_full_disk_adds_no_traceback(
    monkeypatch: pytest.MonkeyPatch, error: Exception, is_shown: bool
) -> None:
    """TensorBoard's writer ends so, and says it again to whoever writes next."""

    def fail() -> None:
        raise error

    def write(*_: object) -> None:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        raise OSError(errno.EFBIG, "File too large", "run")

    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    monkeypatch.setattr(commands_sample, "sample_pictures", write)
    answer = fewstep("sample", "model")
    assert answer.code == 2
    assert "cannot read or write run: File too large" in answer.err
    assert len(told) == is_shown


def test_every_command_has_an_example() -> None:
    assert commands().keys() == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_ends_with_the_example(name: str) -> None:
    for option in ("-h", "--help"):
        result = CliRunner().invoke(app, [*commands()[name], option], env={"COLUMNS": "300"})
        assert result.exit_code == 0
        assert EXAMPLES[name] in result.output
        assert EXAMPLES[name].startswith(f"fewstep {' '.join(commands()[name])}")


def test_each_training_command_names_its_own_recipes() -> None:
    assert "recipes/my_pictures.toml" in CliRunner().invoke(app, ["pretrain", "-h"], env={"COLUMNS": "300"}).output
    assert "imagenet64_dmd2_gan" in CliRunner().invoke(app, ["train", "-h"], env={"COLUMNS": "300"}).output


@pytest.mark.parametrize(
    ("command", "there", "elsewhere"),
    [
        ("train", "recipes/my_pictures_dmd2.toml", "recipes/my_pictures.toml"),
        ("pretrain", "recipes/my_pictures.toml", "dmd2"),
    ],
)
def test_without_a_recipe_it_shows_how_to_begin(
    command: str, there: str, elsewhere: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    output = CliRunner().invoke(app, [command]).output
    assert f"  {there}\n" in output
    assert f"  {elsewhere}\n" not in output
    assert "--dry-run" in output
    assert output.count(EXAMPLES[command]) == 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "circle.toml").write_text('extends = "circle.toml"')
    result = CliRunner().invoke(app, [command])
    assert result.exit_code == 0
    assert "circle" not in result.output


def run_main(monkeypatch: pytest.MonkeyPatch, error: BaseException, *words: str) -> int:
    def stop(prog_name: str) -> None:
        raise error

    monkeypatch.setattr(entry, "app", stop)
    monkeypatch.setattr(sys, "argv", ["fewstep", *words])
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_UPDATE_DOWNLOAD_COUNTS", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit) as end:
        entry.main()
    return int(end.value.code or 0)


def test_a_fault_is_one_sentence_with_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, RuntimeError("index 3 is out of bounds\nand more"), "train") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fewstep: stopped by a fault (RuntimeError: index 3 is out of bounds); its traceback is in ")
    path = Path(line.split("its traceback is in ")[1].split(",")[0])
    assert "RuntimeError: index 3 is out of bounds" in path.read_text()
    path.unlink()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 763. MiB"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000 bytes."),
    ],
)  # fmt: skip
def test_a_lack_of_memory_is_no_fault(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, error, "train") == 2
    assert capsys.readouterr().err.startswith("fewstep: there is not enough memory for this; ask for less at once")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="oh"):
        run_main(monkeypatch, RuntimeError("oh"), "train", "--debug")
    assert run_main(monkeypatch, UserError("no such file"), "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_own_errors_end_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, UserError("no such file")) == 2
    assert capsys.readouterr().err == "fewstep: no such file\n"


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (Terminated(), 143, "stopped by SIGTERM"),
        (
            RunInterrupted("stopped by SIGTERM; saved", 143),
            143,
            "stopped by SIGTERM; saved. Continue with: fewstep settings train",
        ),
    ],
)
def test_ctrl_c_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, told: str
) -> None:
    def stop(*_: object) -> None:
        raise error

    monkeypatch.setattr("fewstep.settings.describe_settings", stop)
    monkeypatch.setattr(sys, "argv", ["fewstep", "settings", "train"])
    with pytest.raises(SystemExit) as end:
        entry.main()
    assert end.value.code == code
    assert capsys.readouterr().err == f"fewstep: {told}\n"


@pytest.mark.slow
def test_nothing_is_counted_or_sent() -> None:
    """Set before `datasets` is imported, which otherwise tells a foreign host of every local set that is read."""
    code = (
        "import sys; sys.argv = ['fewstep', '--version']\nfrom fewstep.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "import datasets.config as c, huggingface_hub.constants as h\n"
        "print(c.HF_UPDATE_DOWNLOAD_COUNTS, h.HF_HUB_DISABLE_TELEMETRY)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "False True"


def test_quickstart_text_is_the_text_one(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[object, ...]] = []
    monkeypatch.setattr(quickstarts, "text_quickstart", lambda *words: called.append(words))
    assert CliRunner().invoke(app, ["quickstart", "--text", "--minutes", "2"]).exit_code == 0
    assert CliRunner().invoke(app, ["quickstart", "--text", "--folder", "here"]).exit_code == 0
    assert called == [(2.0, Path("runs/text-quickstart"), 0), (5.0, Path("here"), 0)]


def test_every_path_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the shell leaves it, as in --grid=~/g.png and run.folder=~/run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    answer = fewstep(
        "sample", "bundled:fashion-mnist", "--num-images", 1, "--teacher-steps", 1, "--grid=~/g.png", "--device", "cpu"
    )
    assert answer.code == 0, answer
    assert (tmp_path / "g.png").is_file()
    assert not (tmp_path / "~").exists()
    assert run_folder(TrainSettings.model_validate({"run": {"folder": "~/run"}})) == tmp_path / "run"


@pytest.mark.parametrize("place", [1, 8])
def test_quiet_may_stand_anywhere_and_leaves_errors(tmp_path: Path, place: int) -> None:
    words = ["sample", "bundled:fashion-mnist", "--num-images", 1, "--teacher-steps", 1, "--grid", tmp_path / "g.png"]
    loud = fewstep(*words)
    assert "images/s" in loud.err
    words.insert(place, "--quiet")
    assert fewstep(*words) == Answer(0, loud.out, "")
    assert fewstep("sample", tmp_path / "nothing", "--quiet").err.startswith("fewstep: ")


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 2), (errno.ENOTDIR, 2), (errno.EBADF, 1)])
def test_a_full_disk_anywhere_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    assert run_main(monkeypatch, OSError(number, os.strerror(number), "/disk/file"), "train") == code
    (line,) = capsys.readouterr().err.splitlines()
    assert "/disk/file" in line


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_names_of_any_bytes_are_told(encoding: str) -> None:
    """What a file is called is no reason for a fault, nor are letters that the terminal has not."""
    script = "import sys, fewstep.__main__ as entry; entry._open_streams(); print('g\\udcffü…'); print('\\udcff', file=sys.stderr)"
    answer = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert (answer.returncode, answer.stdout[:1]) == (0, b"g"), answer.stderr
    if encoding != "ascii":
        assert answer.stdout.rstrip(b"\n") == b"g\xff" + "ü…".encode()


def test_closed_streams_are_taken_by_no_file(tmp_path: Path) -> None:
    """The next file that is opened would get their numbers, and what is told would be written into it."""
    script = f"import fewstep.__main__ as entry; entry._open_streams(); file = open({str(tmp_path / 'f')!r}, 'w'); print(1); assert file.fileno() > 2"
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(script)} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0


def test_a_home_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = fewstep("sample", "~nobody-of-this-name/model", "--grid", "g.png")
    assert answer.code == 2
    assert answer.err.splitlines()[-1].startswith(
        "fewstep: a path begins with ~, and the home folder it means is not known"
    )
