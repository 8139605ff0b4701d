"""`fewstep doctor` says what a machine is good for."""

from types import SimpleNamespace

import pytest
import torch

from fewstep.demos import doctor


def test_it_says_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "step_seconds", lambda: 0.2)
    lines = list(doctor.examine())
    text = "\n".join(lines)
    assert f"torch {torch.__version__}" in lines[0]
    for words in ("instructions ", "GiB of disk are free here", "about 1,500 steps"):
        assert words in text


def test_a_slow_machine_is_told_to_be_patient() -> None:
    line = doctor.quickstart_line(3.0)
    assert "about 100 steps" in line
    assert line.endswith("give it `fewstep quickstart --minutes 50`")
    assert "rough" not in doctor.quickstart_line(0.1)


def test_what_would_fail_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "step_seconds", lambda: 0.2)
    monkeypatch.setattr(doctor, "_version", lambda name: "")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    lines = list(doctor.examine())
    faults = lines[lines.index("what would fail here:") + 1 :]
    assert any("text-to-image models: diffusers, transformers, peft is missing" in line for line in faults)
    assert any("gradio is missing" in line for line in faults)
    assert any("less than 2 GiB" in line for line in faults)


@pytest.mark.slow
def test_a_step_is_measured() -> None:
    assert 0 < doctor.step_seconds(share=48) < 600
