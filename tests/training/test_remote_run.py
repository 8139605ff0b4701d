"""A run whose folder is a URL goes on from any machine, from the last checkpoint that is whole there; fsspec's memory is the storage."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.training import remote_run as module
from fewstep.training.checkpoint import list_checkpoints, read_checkpoint, write_checkpoint
from fewstep.training.remote_run import RemoteRun, staging_folder
from fewstep.training.run import train
from tests.formats.test_remote import storage
from tests.training.helpers import tiny_train_settings

__all__ = ["storage"]
URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSES", (0.0,))


def save(folder: Path, step: int, keep: int = 2) -> None:
    write_checkpoint(folder / "checkpoints", step, {"weight": torch.full((3,), float(step))}, {"phase": "x"}, keep)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")


def last(folder: Path) -> tuple[dict[str, Tensor], int]:
    tensors, state = read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    return tensors, state["step"]


@pytest.fixture
def saved(storage: Any, tmp_path: Path) -> RemoteRun:
    """A run of three checkpoints, of which two stay."""
    run = RemoteRun(URL, tmp_path / "here")
    for step in (2, 4, 6):
        save(run.folder, step)
        run.push()
    return run


def test_what_is_there_is_what_is_here(saved: RemoteRun, storage: Any, tmp_path: Path) -> None:
    (saved.folder / ".lock").touch()
    (saved.folder / "embeddings").mkdir()
    (saved.folder / "embeddings/a").touch()
    saved.push()
    names = {name.removeprefix("/bucket/run/") for name in storage.find("/bucket/run")}
    both = {
        f"checkpoints/step_0000000{step}/{name}" for step in (4, 6) for name in ("state.json", "tensors.safetensors")
    }
    assert names == {"metrics.jsonl", *both}
    other = RemoteRun(URL, tmp_path / "there")
    other.bring()
    tensors, step = last(other.folder)
    assert (step, tensors["weight"].tolist()) == (6, [6.0] * 3)
    assert (other.folder / "metrics.jsonl").read_bytes() == (saved.folder / "metrics.jsonl").read_bytes()


def test_the_proof_comes_last_and_goes_first(saved: RemoteRun, storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for work in ("put_file", "rm_file"):
        original = getattr(type(storage), work)

        def noted(self: Any, *places: str, original: Any = original, **more: Any) -> None:
            done.append(f"{original.__name__} {places[-1].rpartition('/')[2]}")
            original(self, *places, **more)

        monkeypatch.setattr(type(storage), work, noted)
    save(saved.folder, 8)
    saved.push()
    assert done == [
        "put_file tensors.safetensors", "put_file metrics.jsonl", "put_file state.json", "rm_file state.json",
        "rm_file tensors.safetensors",
    ]  # fmt: skip


def test_a_copy_that_breaks_off_is_none(
    saved: RemoteRun, storage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops with a sentence, another machine takes the checkpoint before, and the same command goes on here."""
    original, tries = type(storage).put_file, []

    def broken(self: Any, here: str, there: str, **more: Any) -> None:
        if there.endswith("step_00000008/state.json"):
            tries.append(there)
            raise ConnectionError("reset by peer")
        original(self, here, there, **more)

    save(saved.folder, 8)
    with monkeypatch.context() as patch:
        patch.setattr(type(storage), "put_file", broken)
        with pytest.raises(UserError) as error:
            saved.push()
    assert str(error.value).startswith(
        f"run.folder={URL}: broken of /bucket/run/checkpoints/step_00000008/state.json failed ("
    )
    assert len(tries) == 2
    other = RemoteRun(URL, tmp_path / "there")
    other.bring()
    assert last(other.folder)[1] == 6
    again = RemoteRun(URL, saved.folder)
    again.bring()
    assert last(saved.folder)[1] == 8  # ahead of the URL
    again.push()
    other.bring()
    assert last(other.folder)[1] == 8


def test_damage_there_is_noticed(saved: RemoteRun, storage: Any, tmp_path: Path) -> None:
    storage.pipe("/bucket/run/checkpoints/step_00000006/tensors.safetensors", b"something else")
    other = RemoteRun(URL, tmp_path / "there")
    other.bring()
    with pytest.raises(UserError, match=r"is damaged \(tensors\.safetensors is not what was written\)"):
        last(other.folder)


@pytest.mark.slow
def test_a_run_goes_on_on_another_machine(storage: Any, teacher_folder: Path, pictures: Path, tmp_path: Path) -> None:
    def run(folder: str, steps: int) -> Path:
        changes: dict[str, Any] = {"training": {"num_steps": steps}, "run": {"folder": folder}}
        return train(tiny_train_settings(teacher_folder, pictures, tmp_path, **changes)).folder

    run(str(tmp_path / "disk"), 4)
    calm = run(str(tmp_path / "disk"), 6)
    assert run(URL, 4) == staging_folder(URL)
    shutil.rmtree(staging_folder(URL))
    there = run(URL, 6)
    (one, step), (other, same) = last(calm), last(there)
    assert (step, one.keys()) == (same, other.keys())
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    steps = [json.loads(line)["step"] for line in storage.cat("/bucket/run/metrics.jsonl").splitlines()]
    assert sorted(set(steps)) == list(range(6))
    there_too = {Path(name).name for name in storage.find("/bucket/run/generator")}
    assert there_too == {path.name for path in (there / "generator").rglob("*") if path.is_file()}
