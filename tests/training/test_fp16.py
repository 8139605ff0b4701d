"""Whole runs in fp16 on tiny models: near fp32, an overflow of one role leaves the others alone, continued with its scales."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.distillation.loss_scale import LossScale
from fewstep.errors import UserError
from fewstep.settings import PretrainSettings, TrainSettings, parse_settings
from fewstep.training.checkpoint import list_checkpoints, read_checkpoint
from fewstep.training.ema import WeightAverage
from fewstep.training.run import pretrain, train
from tests.training.helpers import tiny_pretrain_settings, tiny_train_settings

HALF: dict[str, Any] = {"device": "cpu", "precision": "fp16"}


def begin_at(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Every loss scale of a run begins here instead of at 65,536."""

    def of(dtype: torch.dtype, device: torch.device | str) -> LossScale:
        return LossScale(torch.amp.GradScaler("cpu", init_scale=scale, enabled=dtype == torch.float16))

    monkeypatch.setattr(LossScale, "of", of)


def last(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])[0]


@pytest.mark.slow
def test_a_distillation_is_near_fp32_and_continues_exactly(
    teacher_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    def run(name: str, steps: int, **compute: Any) -> Any:
        changes: dict[str, Any] = {"training": {"num_steps": steps}, "compute": {"device": "cpu", **compute}}
        return train(tiny_train_settings(teacher_folder, pictures, tmp_path / name, **changes))

    half, whole = run("half", 4, precision="fp16"), run("whole", 4, precision="fp32")
    for name in ("fake_score_loss", "gan_discriminator_loss", "generator_grad_norm"):
        mine, theirs = half.metrics.column(name), whole.metrics.column(name)
        assert mine == pytest.approx(theirs, rel=0.05), name
        assert mine != theirs, name
    assert half.metrics.column("generator_loss_scale") == [2.0**16] * 2
    assert half.metrics.column("fake_score_loss_scale") == [2.0**16] * 4
    run("parts", 2, precision="fp16")
    run("parts", 4, precision="fp16")
    found, expected = last(tmp_path / "parts"), last(tmp_path / "half")
    assert found.keys() == expected.keys() >= {"generator_optimizer.loss_scale", "fake_score_optimizer.loss_scale"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def averages_told(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each step that an average hears of was made."""
    told: list[bool] = []
    update = WeightAverage.update

    def heard(average: Any, module: Any, seen: int, size: int, made: torch.Tensor | None = None) -> None:
        assert made is not None
        told.append(bool(made))
        update(average, module, seen, size, made)

    monkeypatch.setattr(WeightAverage, "update", heard)
    return told


@pytest.mark.slow
def test_overflows_do_not_end_a_run(
    teacher_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first no gradient fits: neither role moves, nothing infinite is told; each begins once its own scale is low enough."""
    begin_at(monkeypatch, 2.0**30)
    told = averages_told(monkeypatch)
    changes: dict[str, Any] = {
        "training": {"num_steps": 40, "generator_every": 2}, "compute": HALF, "run": {"checkpoint_every": 40},
    }  # fmt: skip
    run = train(tiny_train_settings(teacher_folder, pictures, tmp_path / "run", **changes))
    norms = {name: run.metrics.column(f"{name}_grad_norm") for name in ("generator", "fake_score")}
    assert told == [value > 0 for value in norms["generator"]]
    for name, values in norms.items():
        assert values[0] == 0, name  # not made, and no infinity
        assert values[-1] > 0, name
        scales = run.metrics.column(f"{name}_loss_scale")
        assert scales[:2] == [2.0**30, 2.0**29], name
        made = next(number for number, value in enumerate(values) if value > 0)
        assert scales[made] <= 4 * scales[-1], name  # halved until steps could be made, and no more
    assert run.metrics.column("gan_generator_norm_at_x0")[0] == 0
    assert run.metrics.column("gan_generator_norm_at_x0")[-1] > 0
    first = {name: next(number for number, value in enumerate(values) if value > 0) for name, values in norms.items()}
    assert 2 * first["generator"] != first["fake_score"]  # the roles do not wait for each other


@pytest.mark.slow
def test_a_teacher_is_trained_with_a_scale(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_at(monkeypatch, 2.0**30)
    settings = tiny_pretrain_settings(pictures, tmp_path / "run", training={"num_steps": 24}, compute=HALF)
    told = averages_told(monkeypatch)
    run = pretrain(settings)
    norms = run.metrics.column("grad_norm")
    assert told == [value > 0 for value in norms]
    assert norms[0] == 0
    assert norms[-1] > 0
    assert "optimizer.loss_scale" in last(tmp_path / "run")


def test_weights_kept_in_bf16_are_computed_with_in_bf16() -> None:
    values: dict[str, Any] = {"teacher": {"path": "x"}, "memory": {"base": "bf16"}, "compute": HALF}
    with pytest.raises(UserError, match=r"memory\.base='bf16' needs compute\.precision='bf16'"):
        parse_settings(TrainSettings, values, "test")
    assert parse_settings(PretrainSettings, {"compute": HALF}, "test").compute.precision == "fp16"
