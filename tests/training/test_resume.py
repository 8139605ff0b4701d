"""A run that is killed again and again ends in the same bits as one that is not."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fewstep.training.build import open_teacher
from fewstep.training.checkpoint import list_checkpoints
from fewstep.training.distill import DistillationJob
from fewstep.training.run import pretrain, train
from tests.training.helpers import tiny_pretrain_settings, tiny_train_settings


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(folder / "checkpoints")[-1] / "tensors.safetensors")


def assert_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@pytest.mark.parametrize(("steps", "taps"), [([999], [0.5]), ([999, 749, 499, 249], [0.25, 0.5, 1.0])])
def test_continued_run_is_bit_identical(
    teacher_folder: Path, pictures: Path, tmp_path: Path, steps: list[int], taps: list[float]
) -> None:
    changes: dict[str, dict[str, Any]] = {"generator": {"step_indices": steps}, "losses": {"gan_taps": taps}}
    whole = tiny_train_settings(teacher_folder, pictures, tmp_path / "whole", **changes)
    train(whole)
    for stop in (3, 6):
        changes["training"] = {"num_steps": stop}
        train(tiny_train_settings(teacher_folder, pictures, tmp_path / "parts", **changes))
    assert_identical(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "parts"))
    generator = "generator/unet/diffusion_pytorch_model.safetensors"
    assert_identical(load_file(tmp_path / "whole" / generator), load_file(tmp_path / "parts" / generator))
    assert _losses(tmp_path / "whole") == _losses(tmp_path / "parts")


def test_continued_pretraining_is_bit_identical(pictures: Path, tmp_path: Path) -> None:
    pretrain(tiny_pretrain_settings(pictures, tmp_path / "whole"))
    for stop in (1, 4):
        pretrain(tiny_pretrain_settings(pictures, tmp_path / "parts", training={"num_steps": stop}))
    assert_identical(final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "parts"))


def steps_from(job: DistillationJob, first: int, last: int) -> dict[str, torch.Tensor]:
    """Everything trained after steps first..last - 1, copied."""
    for step in range(first, last):
        job.step(step, 0.0)
    return {name: value.clone() for name, value in job.tensors().items()}


def test_every_field_of_an_optimiser_is_continued(teacher_folder: Path, pictures: Path, tmp_path: Path) -> None:
    """Restored exactly; and each of them matters, for a continuation without one ends in other weights."""
    settings = tiny_train_settings(teacher_folder, pictures, tmp_path / "run")

    def new_job() -> DistillationJob:
        return DistillationJob(settings, open_teacher(settings))

    job = new_job()
    middle, expected = steps_from(job, 0, 3), steps_from(job, 3, 6)
    fields = {(name.split(".")[0], name.rpartition(".")[2]) for name in middle if "_optimizer." in name}
    optimizers, names = ("generator_optimizer", "fake_score_optimizer"), ("step", "exp_avg", "exp_avg_sq")
    assert fields == {(optimizer, name) for optimizer in optimizers for name in names}
    again = new_job()
    again.restore(middle)
    assert_identical(again.tensors(), middle)
    assert_identical(steps_from(again, 3, 6), expected)
    for optimizer, field in sorted(fields):
        lost = {
            name: torch.zeros_like(value) if name.startswith(f"{optimizer}.") and name.endswith(f".{field}") else value
            for name, value in middle.items()
        }
        other = new_job()
        other.restore(lost)
        found, role = steps_from(other, 3, 6), optimizer.removesuffix("_optimizer")
        changed = [n for n in found if n.startswith(f"{role}.") and not torch.equal(found[n], expected[n])]
        assert changed, (optimizer, field)


def _losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_second", "peak_memory_gib", "data_wait_share")
    return [kept for line in lines if len(kept := {k: v for k, v in line.items() if k not in timed}) > 1]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_many_kills(teacher_folder: Path, pictures: Path, tmp_path: Path, kills: int) -> None:
    """SIGKILL at random moments, at least a quarter of them while a checkpoint is being written."""
    run = {"checkpoint_every": 1, "keep_checkpoints": 1}
    training = {"num_steps": 2 * kills}
    whole = tiny_train_settings(teacher_folder, pictures, tmp_path / "whole", run=run, training=training)
    train(whole)
    folder = tmp_path / "killed"
    settings = tiny_train_settings(
        teacher_folder, pictures, folder, run={**run, "folder": str(folder)}, training=training
    )
    chance = random.Random(0)
    inside = 0
    for number in range(kills):
        inside += _start_and_kill(settings, folder, chance, during_checkpoint=number % 2 == 0)
        for path in list_checkpoints(folder / "checkpoints"):  # what is there is complete
            assert {entry.name for entry in path.iterdir()} == {"tensors.safetensors", "state.json"}
            load_file(path / "tensors.safetensors")
    assert inside >= kills / 4, f"only {inside} kills fell into checkpoint writing"
    finished = list_checkpoints(folder / "checkpoints")
    assert not finished or finished[-1].name < f"step_{2 * kills:08d}", "the run ended before the kills did"
    train(settings)
    assert_identical(final_tensors(tmp_path / "whole"), final_tensors(folder))
    assert _losses(tmp_path / "whole") == _losses(folder)


def _start_and_kill(settings, folder: Path, chance: random.Random, during_checkpoint: bool) -> bool:  # type: ignore[no-untyped-def]
    """Train in a forked child, kill it; returns whether a half-written checkpoint was left behind."""
    checkpoints = folder / "checkpoints"
    known = {path.name for path in list_checkpoints(checkpoints)}
    started = time.time_ns()
    child = multiprocessing.get_context("fork").Process(target=_train_quietly, args=(settings,))
    child.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.is_alive():
        if during_checkpoint and _being_written(checkpoints, started):
            break
        if not during_checkpoint and {path.name for path in list_checkpoints(checkpoints)} - known:
            time.sleep(chance.random() * 0.05)
            break
    assert child.is_alive(), "the run ended before it could be killed"
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    return _being_written(checkpoints, started)


def _being_written(checkpoints: Path, since: int) -> bool:
    """Whether a half-written checkpoint lies there that was begun after `since` (nanoseconds)."""
    try:
        return any(path.stat().st_ctime_ns > since for path in checkpoints.glob(".step*"))
    except OSError:  # finished or gone between the two calls
        return False


def _train_quietly(settings) -> None:  # type: ignore[no-untyped-def]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    train(settings)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # what torch warns of while it compiles
def test_continued_compiled_run_is_bit_identical(teacher_folder: Path, pictures: Path, tmp_path: Path) -> None:
    """torch.compile in both sessions; and what it trains is what a run without it trains, but for rounding."""
    compute = {"compile": True}
    train(tiny_train_settings(teacher_folder, pictures, tmp_path / "whole", compute=compute, training={"num_steps": 4}))
    for stop in (2, 4):
        train(
            tiny_train_settings(
                teacher_folder, pictures, tmp_path / "parts", compute=compute, training={"num_steps": stop}
            )
        )
    whole, parts = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "parts")
    assert_identical(whole, parts)
    assert not any("_orig_mod" in name for name in whole)  # a run without it can go on from here
    train(tiny_train_settings(teacher_folder, pictures, tmp_path / "plain", training={"num_steps": 4}))
    plain = final_tensors(tmp_path / "plain")
    assert plain.keys() == whole.keys()
    weights = [name for name in plain if name.startswith("generator.") and plain[name].is_floating_point()]
    assert weights
    assert max(float((plain[name] - whole[name]).abs().max()) for name in weights) < 1e-3
