"""A run that is asked to stop saves itself; one folder has one process; a checkpoint proves itself."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fewstep.errors import RunInterrupted, UserError
from fewstep.training.checkpoint import list_checkpoints, read_checkpoint, write_checkpoint
from fewstep.training.run_folder import claim_run_folder, hold, release
from fewstep.training.trainer import run_job
from fewstep.training.watch import Watch, every_steps
from tests.training.test_trainer import Counting, counting_settings

HOLDER = """
import sys, time
from pathlib import Path
from fewstep.training.run_folder import hold
hold(Path(sys.argv[1])); print("held", flush=True); time.sleep(60)
"""


class Signalled(Counting):
    """Sends itself signals in its third step."""

    def __init__(self, *signals: int) -> None:
        super().__init__()
        self.signals = signals

    def step(self, step: int, progress: float) -> dict[str, torch.Tensor]:
        if step == 2:
            for number in self.signals:
                os.kill(os.getpid(), number)
        return super().step(step, progress)


@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)])
def test_a_run_that_is_stopped_saves_itself(tmp_path: Path, number: int, name: str, code: int) -> None:
    settings = counting_settings(tmp_path, run={"checkpoint_every": 1000})
    before = signal.getsignal(number)
    with pytest.raises(
        RunInterrupted, match=rf"^stopped by {name} after 3 steps; everything is saved in .*/step_00000003$"
    ) as stop:
        run_job(Signalled(number), settings, tmp_path)
    assert stop.value.exit_code == code
    assert signal.getsignal(number) is before
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    run_job(Counting(), settings, tmp_path)
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "step_00000005"


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    settings = counting_settings(tmp_path, run={"checkpoint_every": 1000})
    with pytest.raises(KeyboardInterrupt) as stop:
        run_job(Signalled(signal.SIGINT, signal.SIGINT), settings, tmp_path)
    assert not isinstance(stop.value, RunInterrupted)
    assert not list_checkpoints(tmp_path / "checkpoints")


def test_a_measurement_is_given_up_and_made_again(tmp_path: Path) -> None:
    measured: list[int] = []

    def measure() -> dict[str, float]:
        measured.append(len(measured))
        if len(measured) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the measurement went on")
        return {"frechet_distance": 1.0}

    settings = counting_settings(tmp_path, run={"checkpoint_every": 2})
    watch = Watch(measure, tmp_path / "best.json", every_steps(2), console=Console(quiet=True))
    with pytest.raises(RunInterrupted, match="after 2 steps"):
        run_job(Counting(), settings, tmp_path, watches=(watch,))
    again = Watch(measure, tmp_path / "best.json", every_steps(2), console=Console(quiet=True))
    run_job(Counting(), settings, tmp_path, watches=(again,))
    assert [point.step for point in again.points] == [2, 4]


@pytest.mark.slow
def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"another process trains in .*run; wait for it"):
            claim_run_folder(counting_settings(folder), folder)
        assert not (folder / "settings.json").exists()
        other.kill()
    claim_run_folder(counting_settings(folder), folder)
    release(folder)


@pytest.mark.slow
def test_a_folder_is_free_after_its_run(tmp_path: Path) -> None:
    settings = counting_settings(tmp_path)
    claim_run_folder(settings, tmp_path)
    run_job(Counting(), settings, tmp_path)
    code = f"from fewstep.training.run_folder import hold; from pathlib import Path; hold(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    hold(tmp_path)
    release(tmp_path)


def test_what_a_kill_left_of_the_settings_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".settings.json.writing").write_text("{")
    claim_run_folder(counting_settings(tmp_path), tmp_path)
    release(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "data.json"}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


def drop(path: Path) -> None:
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    tensors.pop("a")
    save_file(tensors, path)


@pytest.mark.parametrize("spoil", [flip, drop])
def test_a_checkpoint_proves_itself(tmp_path: Path, spoil: object) -> None:
    tensors = {"a": torch.ones(100), "b": torch.zeros(100)}
    for step in (2, 4):
        write_checkpoint(tmp_path, step, tensors, {"phase": "count"}, keep=2)
    spoil(tmp_path / "step_00000004/tensors.safetensors")  # type: ignore[operator]
    with pytest.raises(
        UserError, match=r"step_00000004 is damaged \(tensors\.safetensors is not what was written\); remove it to continue "
        "from step_00000002, the one before",
    ):  # fmt: skip
        read_checkpoint(tmp_path / "step_00000004")
    assert read_checkpoint(tmp_path / "step_00000002")[0].keys() == tensors.keys()


@pytest.mark.parametrize(
    "content", [b"[]", b"3", b"null", b"{", b"\xff\xfe", b'{"step": "x"}', b"[" * 100_000, b'{"step": 1, "phase": 2}']
)
def test_a_state_of_another_shape_is_the_same_sentence(tmp_path: Path, content: bytes) -> None:
    run_job(Counting(), counting_settings(tmp_path), tmp_path)
    path = list_checkpoints(tmp_path / "checkpoints")[-1]
    (path / "state.json").write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint .*step_00000005 is damaged \(.*\); remove it to "):
        run_job(Counting(), counting_settings(tmp_path), tmp_path)


def test_checkpoints_of_earlier_versions_have_no_digests(tmp_path: Path) -> None:
    run_job(Counting(), counting_settings(tmp_path), tmp_path)
    path = list_checkpoints(tmp_path / "checkpoints")[-1] / "state.json"
    state = json.loads(path.read_text())
    path.write_text(
        json.dumps({name: value for name, value in state.items() if name not in ("files", "tensors", "state")})
    )
    run_job(Counting(), counting_settings(tmp_path, {"num_steps": 6}), tmp_path)
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "step_00000006"


def test_a_run_says_where_it_is_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_job(Counting(), counting_settings(tmp_path), tmp_path, console=Console(stderr=True, force_terminal=False))
    lines = capsys.readouterr().err.splitlines()
    assert any(line.endswith("begins (0%)") for line in lines)
    assert any(line.endswith("step 5, done (100%)") for line in lines)
    assert "begins" in (tmp_path / "log.txt").read_text()
