"""Where networks run and in which precision: what is fast is found out, said, and kept by a run that goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewstep import devices
from fewstep.devices import choose_device, choose_precision, cpu_slowdown
from fewstep.errors import UserError
from fewstep.settings import TrainSettings, parse_settings
from fewstep.training.precision import settle_precision

CPU = torch.device("cpu")
pytestmark = pytest.mark.real_precision


@pytest.fixture
def slowdown(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Processor times relative to fp32, by precision."""
    found = {"bf16": 15.2, "fp16": 20.0}
    monkeypatch.setattr(devices, "cpu_slowdown", found.__getitem__)
    return found


def chosen(wanted: str, device: torch.device = CPU) -> tuple[str, list[str]]:
    said: list[str] = []
    return choose_precision(wanted, device, said.append), said


@pytest.mark.parametrize(
    ("factor", "name", "line"),
    [
        (15.2, "fp32", "precision fp32: bf16 would be 15 times slower here"),
        (1.3, "fp32", "precision fp32: bf16 would be 1.3 times slower here"),
        (0.95, "fp32", "precision fp32: bf16 would not be faster here"),
        (0.5, "bf16", "precision bf16: 2.0 times as fast as fp32 here"),
    ],
)
def test_auto_is_what_is_fast_here(slowdown: dict[str, float], factor: float, name: str, line: str) -> None:
    slowdown["bf16"] = factor
    assert chosen("auto") == (name, [line])


@pytest.mark.parametrize(("name", "times"), [("bf16", "15 times"), ("fp16", "20 times")])
def test_a_slow_precision_is_taken_and_warned_of(slowdown: dict[str, float], name: str, times: str) -> None:
    warning = f"warning: precision {name} is {times} slower than fp32 on this processor; fp32 or auto is faster"
    assert chosen(name) == (name, [warning])


def test_a_fast_one_and_fp32_need_no_word(slowdown: dict[str, float]) -> None:
    slowdown["bf16"] = 0.6
    assert chosen("bf16") == ("bf16", [])
    assert chosen("fp32") == ("fp32", [])


@pytest.mark.parametrize(("supported", "name"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_knows(monkeypatch: pytest.MonkeyPatch, supported: bool, name: str) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: supported and not including_emulation
    )
    assert chosen("auto", torch.device("cuda"))[0] == name
    assert bool(chosen("bf16", torch.device("cuda"))[1]) != supported


def test_another_precision_is_refused() -> None:
    with pytest.raises(UserError, match="precision='fp8': choose auto, fp32, bf16 or fp16"):
        choose_precision("fp8", CPU)


@pytest.mark.slow
def test_the_measurement_sees_missing_instructions() -> None:
    """Without bf16 instructions, which torch can be told to leave alone, `auto` is fp32 in well under two seconds."""
    code = (
        "import time, torch\nfrom fewstep.devices import choose_precision\nbegun = time.process_time()\n"
        "name = choose_precision('auto', torch.device('cpu'), print)\nprint(name, time.process_time() - begun)"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    line, last = result.stdout.splitlines()
    name, seconds = last.split()
    assert line.startswith("precision fp32: bf16 would be ")
    assert name == "fp32"
    assert float(seconds) < 2


@pytest.mark.slow
def test_the_measurement_leaves_no_trace() -> None:
    torch.manual_seed(3)
    expected, threads = torch.rand(4), torch.get_num_threads()
    torch.manual_seed(3)
    cpu_slowdown.cache_clear()
    assert cpu_slowdown("bf16") > 0
    assert torch.equal(torch.rand(4), expected)
    assert torch.get_num_threads() == threads


# in a run


def settings(**groups: dict[str, object]) -> TrainSettings:
    return parse_settings(TrainSettings, {"compute": {"device": "cpu"}, **groups}, "test")


def settled(tmp_path: Path, **groups: dict[str, object]) -> tuple[str, list[str]]:
    said: list[str] = []
    return settle_precision(settings(**groups), tmp_path, said.append).compute.precision, said


def test_a_run_takes_what_is_fast_and_goes_on_with_it(tmp_path: Path, slowdown: dict[str, float]) -> None:
    assert settled(tmp_path) == ("fp32", ["precision fp32: bf16 would be 15 times slower here"])
    stored = settings(compute={"device": "cpu", "precision": "fp32"}).model_dump_json()
    (tmp_path / "settings.json").write_text(stored)
    slowdown["bf16"] = 0.5  # another machine
    assert settled(tmp_path) == ("fp32", ["precision fp32: as this run began"])
    assert settled(tmp_path, compute={"device": "cpu", "precision": "bf16"}) == ("bf16", [])


@pytest.mark.parametrize("text", ["", "[]", "3", '{"compute": 1}', '{"compute": {"precision": ["fp32"]}}', "\x00"])
def test_a_damaged_run_folder_is_left_to_who_reads_it(tmp_path: Path, slowdown: dict[str, float], text: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    assert settled(tmp_path)[0] == "fp32"


def test_weights_stored_in_bf16_are_computed_with_in_bf16(tmp_path: Path, slowdown: dict[str, float]) -> None:
    memory = {"mode": "shared_base", "base": "bf16"}
    name, said = settled(tmp_path, memory=memory)
    assert name == "bf16"
    assert said == ["warning: precision bf16 is 15 times slower than fp32 on this processor; fp32 or auto is faster"]


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "cpu:x", "meta"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match=f"compute.device='{name}'"):
        choose_device(name)


@pytest.mark.slow
@pytest.mark.usefixtures("slowdown")
def test_the_run_folder_says_which(tmp_path: Path, teacher_folder: Path) -> None:
    from fewstep.training.run import train

    values = {
        "teacher": {"path": str(teacher_folder)}, "run": {"folder": str(tmp_path / "run"), "sample_images": 1},
        "training": {"num_steps": 1, "batch_size": 2}, "compute": {"device": "cpu"},
    }  # fmt: skip
    train(parse_settings(TrainSettings, values, "test"))
    stored = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert stored["compute"]["precision"] == "fp32"
