"""Checkpoints are written beside training: of the step they are of, and a fault of theirs ends the run."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.settings import OptimizerSettings
from fewstep.training import saving
from fewstep.training.checkpoint import list_checkpoints, module_tensors, read_checkpoint, write_checkpoint
from fewstep.training.run import train
from fewstep.training.saving import Saver
from fewstep.training.update import Update, build_update
from tests.training.helpers import tiny_train_settings


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set."""
    event = threading.Event()

    def late(*arguments: Any) -> Path:
        event.wait(30)
        return write_checkpoint(*arguments)

    monkeypatch.setattr(saving, "write_checkpoint", late)
    return event


def trained(network: nn.Module, update: Update, steps: int) -> dict[str, Tensor]:
    """What a checkpoint has after some more steps."""
    for _ in range(steps):
        update.backward(network(torch.ones(2, 3)).sum())
        update.step()
    return {**module_tensors("network", network), **update.tensors("optimizer")}


def test_training_goes_on_and_the_checkpoint_stays_of_its_step(tmp_path: Path, changed: threading.Event) -> None:
    """Weights, moments and step counters are changed in place before any of them is written."""
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    update = build_update(dict(network.named_parameters()), 1e-2, OptimizerSettings())
    tensors = trained(network, update, 2)
    expected = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    saver = Saver(tmp_path, keep=2)
    saver.start(2, tensors, {"phase": "test"})
    after = trained(network, update, 3)
    assert not list_checkpoints(tmp_path)
    changed.set()
    saver.finish()
    found, state = read_checkpoint(tmp_path / "step_00000002")
    assert state == {"phase": "test", "step": 2}
    assert float(expected["optimizer.weight.step"]) == 2
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert not torch.equal(found[name], after[name]), name


def test_files_are_those_of_a_checkpoint_written_at_once(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last), "a": torch.tensor(7)}
    saver = Saver(tmp_path / "beside", keep=1)
    saver.start(3, tensors, {"phase": "test"})
    saver.finish()
    at_once = write_checkpoint(tmp_path / "at once", 3, tensors, {"phase": "test"}, keep=1)
    for name in ("tensors.safetensors", "state.json"):
        assert (tmp_path / "beside/step_00000003" / name).read_bytes() == (at_once / name).read_bytes()


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_step(
    tmp_path: Path, teacher_folder: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Path:
        raise UserError("the disk is full")

    monkeypatch.setattr(saving, "write_checkpoint", full)
    steps: list[int] = []

    def observer(step: int, seconds: float) -> None:
        steps.append(step)
        if step == 2:  # the first checkpoint's
            [thread.join() for thread in threading.enumerate() if thread.name == "checkpoint"]

    with pytest.raises(UserError, match="the disk is full"):
        train(tiny_train_settings(teacher_folder, pictures, tmp_path / "run"), observers=(observer,))
    assert steps == [1, 2]
