"""Checkpoints are complete or absent, exact, few, and nothing in them is ever executed."""

import errno
import json
import math
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.formats import atomic
from fewstep.formats.atomic import remove_leftovers
from fewstep.training import checkpoint
from fewstep.training.checkpoint import (
    Progress,
    list_checkpoints,
    module_tensors,
    random_state,
    read_checkpoint,
    read_progress,
    restore_module,
    restore_random_state,
    write_checkpoint,
)
from fewstep.training.run import pretrain, train
from fewstep.training.update import Update
from tests.training.helpers import tiny_pretrain_settings, tiny_train_settings

STATE = {"phase": "distill", "elapsed_seconds": 1.5, "data_position": 8}


def some_tensors(value: float = 1.0) -> dict[str, Tensor]:
    return {"a.weight": torch.full((4, 3), value), "b.step": torch.tensor(7), "c": torch.ones(2, dtype=torch.bfloat16)}


def names_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def whole(step: int) -> set[str]:
    name = f"step_{step:08d}"
    return {name, f"{name}/tensors.safetensors", f"{name}/state.json"}


def test_round_trip(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 3, some_tensors(), STATE, keep=2)
    assert path == tmp_path / "step_00000003"
    assert names_below(tmp_path) == whole(3)
    tensors, state = read_checkpoint(path)
    assert state == {**STATE, "step": 3}
    assert tensors.keys() == some_tensors().keys()
    for name, value in some_tensors().items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10, 100_000_000):
        write_checkpoint(tmp_path, step, some_tensors(step), STATE, keep=3)
    assert [read_checkpoint(path)[1]["step"] for path in list_checkpoints(tmp_path)] == [9, 10, 100_000_000]


def test_what_lies_beside_checkpoints_is_none(tmp_path: Path) -> None:
    """A damaged one that was moved aside, a copy, a note: the run goes on from what is left."""
    for step in (1, 2):
        write_checkpoint(tmp_path, step, some_tensors(step), STATE, keep=3)
    (tmp_path / "step_00000002").rename(tmp_path / "step_00000002.bak")
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000001 (copy)")
    (tmp_path / "step_notes.txt").write_text("mine")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]


def test_no_folder_is_no_checkpoints(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "nothing") == []


def test_what_a_kill_left_behind_is_invisible_and_removed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, some_tensors(), STATE, keep=2)
    (tmp_path / ".step_00000002.writing").mkdir()
    (tmp_path / ".step_00000002.writing/tensors.safetensors").write_bytes(b"half")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
    remove_leftovers(tmp_path)
    assert names_below(tmp_path) == whole(1)


# --- Failing writes


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    path.write_bytes(b"half of it")
    full()


FAILURES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "tensors": lambda patch: patch.setattr(checkpoint, "write_tensor_file", half_written_tensors),
    "state": lambda patch: patch.setattr(Path, "write_text", full),
    "flush": lambda patch: patch.setattr(atomic, "flush_to_disk", full),
    "rename": lambda patch: patch.setattr(os, "rename", full),
}


@pytest.mark.parametrize("stage", FAILURES)
def test_a_failing_write_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    earlier = write_checkpoint(tmp_path, 1, some_tensors(), STATE, keep=1)
    content = {path.name: path.read_bytes() for path in earlier.iterdir()}
    with monkeypatch.context() as patch:
        FAILURES[stage](patch)
        with pytest.raises(UserError) as error:
            write_checkpoint(tmp_path, 2, some_tensors(2.0), STATE, keep=1)
    message = str(error.value)
    assert f"cannot write {tmp_path / 'step_00000002'}" in message
    assert "No space left on device" in message
    assert "Free some space" in message
    assert names_below(tmp_path) == whole(1)
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == content
    assert write_checkpoint(tmp_path, 2, some_tensors(2.0), STATE, keep=1).is_dir()  # and it works once there is space
    assert names_below(tmp_path) == whole(2)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    write_checkpoint(tmp_path, 1, some_tensors(), STATE, keep=1)
    monkeypatch.setattr(checkpoint, "write_tensor_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 2, some_tensors(), STATE, keep=1)
    assert names_below(tmp_path) == whole(1)


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """Files may not grow beyond `limit` bytes, so that writing ends half-way as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_real_write_that_fails_half_way(tmp_path: Path) -> None:
    """The operating system itself refuses after 64 KiB."""
    write_checkpoint(tmp_path, 1, some_tensors(), STATE, keep=1)
    big = {"weight": torch.zeros(100_000)}
    with small_disk(65_536), pytest.raises(UserError) as error:
        write_checkpoint(tmp_path, 2, big, STATE, keep=1)
    message = str(error.value)
    assert message.startswith(f"cannot write {tmp_path / 'step_00000002'}")
    assert "File too large" in message
    assert "Free some space" in message
    assert names_below(tmp_path) == whole(1)
    assert torch.equal(read_checkpoint(tmp_path / "step_00000001")[0]["a.weight"], some_tensors()["a.weight"])


@pytest.mark.slow
def test_a_run_whose_disk_fills_up_keeps_its_checkpoint(teacher_folder: Path, pictures: Path, tmp_path: Path) -> None:
    """The same in a run: the second session ends with a sentence, a third one continues from the first."""
    folder = tmp_path / "run"
    train(tiny_train_settings(teacher_folder, pictures, folder, training={"num_steps": 2}))
    before = (folder / "checkpoints/step_00000002/tensors.safetensors").read_bytes()
    longer = tiny_train_settings(teacher_folder, pictures, folder, training={"num_steps": 4})
    with small_disk(200_000), pytest.raises(UserError) as error:
        train(longer)
    assert str(error.value).startswith(f"cannot write {folder / 'checkpoints/step_00000004'}")
    assert names_below(folder / "checkpoints") == whole(2)
    assert (folder / "checkpoints/step_00000002/tensors.safetensors").read_bytes() == before
    assert not list(folder.rglob(".*"))
    train(longer)
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step_00000002", "step_00000004"]


# --- Damage


def test_truncated_tensors(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, some_tensors(), STATE, keep=1)
    file = path / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"checkpoint .*step_00000001 is damaged .*remove it to begin again"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path, 1, some_tensors(), STATE, keep=1)
    (path / name).unlink()
    with pytest.raises(UserError, match=f"step_00000001 is damaged .*{name}"):
        read_checkpoint(path)


def test_a_changed_state_is_noticed(tmp_path: Path) -> None:
    """One digit of it is as much a part of the run as a weight; earlier versions wrote no digest of it."""
    path = write_checkpoint(tmp_path, 1, some_tensors(), STATE, keep=1)
    written = (path / "state.json").read_text()
    (path / "state.json").write_text(written.replace('"elapsed_seconds": 1.5', '"elapsed_seconds": 9.5'))
    with pytest.raises(UserError, match=r"step_00000001 is damaged \(state\.json is not what was written\)"):
        read_checkpoint(path)
    earlier = json.loads(written)
    del earlier["state"]
    (path / "state.json").write_text(json.dumps(earlier))
    assert read_checkpoint(path)[1] == {**STATE, "step": 1}


@pytest.mark.parametrize("text", ["", "{", "not json"])
def test_damaged_state(tmp_path: Path, text: str) -> None:
    path = write_checkpoint(tmp_path, 1, some_tensors(), STATE, keep=1)
    (path / "state.json").write_text(text)
    with pytest.raises(UserError, match="step_00000001 is damaged"):
        read_checkpoint(path)


@pytest.mark.slow
def test_a_damaged_checkpoint_stops_the_run_and_removing_it_helps(
    teacher_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    """What the message advises works."""
    settings = tiny_train_settings(teacher_folder, pictures, tmp_path / "run", training={"num_steps": 4})
    train(settings)
    newest = tmp_path / "run/checkpoints/step_00000004"
    content = (newest / "tensors.safetensors").read_bytes()
    (newest / "tensors.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(
        UserError, match=r"step_00000004 is damaged .*remove it to continue from step_00000002, the one before"
    ):
        train(settings)
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    train(settings)
    assert (newest / "tensors.safetensors").read_bytes() == content


# --- What is in it


class Marker:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_in_disguise_is_refused_and_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Marker(marker)))
    assert marker.exists()  # the trap works
    marker.unlink()
    path = write_checkpoint(tmp_path / "checkpoints", 1, some_tensors(), STATE, keep=1)
    for write in (
        lambda file: file.write_bytes(pickle.dumps(Marker(marker))),
        lambda file: torch.save({"a.weight": Marker(marker)}, file),
    ):
        write(path / "tensors.safetensors")
        with pytest.raises(UserError, match="is damaged"):
            read_checkpoint(path)
        assert not marker.exists()


@pytest.fixture
def no_unpickling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)


@pytest.mark.slow
def test_checkpoint_of_a_run(
    teacher_folder: Path, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Only safetensors and JSON; networks, average, optimisers, random state, data position and phase are there."""
    settings = tiny_train_settings(teacher_folder, pictures, tmp_path / "run", training={"num_steps": 2})
    train(settings)
    (path,) = list_checkpoints(tmp_path / "run/checkpoints")
    assert_no_pickle(path)
    tensors, state = read_checkpoint(path)
    kinds = {name.split(".")[0] for name in tensors}
    assert kinds == {
        "generator", "fake_score", "discriminator", "average", "generator_optimizer", "fake_score_optimizer", "random",
    }  # fmt: skip
    moments = {name.rsplit(".", 1)[1] for name in tensors if name.startswith("generator_optimizer.")}
    assert moments == {"step", "exp_avg", "exp_avg_sq"}
    assert not any(name.startswith("teacher") for name in tensors)
    assert (state["step"], state["phase"], state["data_position"]) == (2, "distill", 2 * 4)
    assert state["draws"] == {"generator": "philox4x32-10", "seed": 3}
    assert state["elapsed_seconds"] > 0
    request.getfixturevalue("no_unpickling")
    train(settings.model_copy(update={"training": settings.training.model_copy(update={"num_steps": 3})}))


@pytest.mark.slow
def test_checkpoint_of_pretraining(pictures: Path, tmp_path: Path) -> None:
    pretrain(tiny_pretrain_settings(pictures, tmp_path / "run", training={"num_steps": 1}))
    (path,) = list_checkpoints(tmp_path / "run/checkpoints")
    assert_no_pickle(path)
    tensors, state = read_checkpoint(path)
    assert {name.split(".")[0] for name in tensors} == {"teacher", "average", "optimizer", "random"}
    assert state["phase"] == "pretrain"


def assert_no_pickle(path: Path) -> None:
    for file in path.rglob("*"):
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            assert file.suffix == ".safetensors"
            with safe_open(file, "pt") as content:
                assert content.keys()


def small_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def update_of(network: nn.Module, optimizer: torch.optim.Optimizer) -> Update:
    return Update(dict(network.named_parameters()), 0.1, optimizer, 1e9)


def train_a_little(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for number in range(steps):
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
        network(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_modules_and_optimisers_continue_exactly(tmp_path: Path) -> None:
    network = small_network(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
    train_a_little(network, optimizer, 3)
    write_checkpoint(
        tmp_path, 3, {**module_tensors("net", network), **update_of(network, optimizer).tensors("opt")}, STATE, keep=1
    )
    tensors, _ = read_checkpoint(tmp_path / "step_00000003")

    other = small_network(1)
    again = torch.optim.AdamW(other.parameters(), lr=0.02, fused=True)
    restore_module("net", other, tensors)
    update_of(other, again).restore("opt", tensors)
    assert again.param_groups[0]["lr"] == 0.02  # the rate is the step's business
    again.param_groups[0]["lr"] = 0.1
    train_a_little(network, optimizer, 3)
    train_a_little(other, again, 3)
    for name, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    saved, restored = update_of(network, optimizer).tensors("opt"), update_of(other, again).tensors("opt")
    assert "opt.0.weight.exp_avg" in saved  # by the parameter's name
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[name], restored[name]) for name in saved)


def test_names_with_a_common_start_are_kept_apart() -> None:
    """`generator` must not take `generator_optimizer`'s tensors, nor `fake` those of `fake_score`."""
    network, other = nn.Linear(2, 2), nn.Linear(2, 2)
    tensors = {**module_tensors("fake", network), **module_tensors("fake_score", nn.Linear(3, 3))}
    restore_module("fake", other, tensors)
    assert torch.equal(other.weight, network.weight)


def test_another_network_is_named(tmp_path: Path) -> None:
    tensors = module_tensors("generator", nn.Linear(2, 2))
    with pytest.raises(UserError, match="the checkpoint's generator is another network"):
        restore_module("generator", nn.Linear(3, 2), tensors)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"step": 3}, "state.json says that it is of step 3"), ({"step": True}, "another shape"),
        ({"elapsed_seconds": math.nan}, "another shape"), ({"elapsed_seconds": 10**400}, "another shape"),
    ],
)  # fmt: skip
def test_how_far_a_run_was_is_believed_only_where_it_can_be(
    tmp_path: Path, change: dict[str, float], told: str
) -> None:
    state = {"phase": "training", "elapsed_seconds": 1.5, "step": 2}
    path = write_checkpoint(tmp_path, 2, {"a": torch.zeros(1)}, state, keep=2)
    assert read_progress(path, read_checkpoint(path)[1]) == Progress("training", 2, 1.5)
    with pytest.raises(UserError, match=told):
        read_progress(path, {**state, **change})


def test_random_state_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.rand(3)
    write_checkpoint(tmp_path, 1, random_state(), STATE, keep=1)
    expected = torch.rand(4)
    torch.manual_seed(6)
    restore_random_state(tmp_path / "step_00000001", read_checkpoint(tmp_path / "step_00000001")[0])
    assert torch.equal(torch.rand(4), expected)
