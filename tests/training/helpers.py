"""Settings of tiny runs that several tests start."""

from pathlib import Path
from typing import Any

from fewstep.settings import PretrainSettings, TrainSettings, parse_settings


def tiny_train_settings(teacher: Path, pictures: Path, folder: Path, **changes: dict[str, Any]) -> TrainSettings:
    """One-step DMD2 with GAN and EMA on 16x16 pictures; `changes` are merged by section."""
    values: dict[str, dict[str, Any]] = {
        "teacher": {"path": str(teacher)},
        "generator": {"ema_half_life_images": 100},
        "data": {"images": str(pictures)},
        "losses": {"gan_generator_weight": 3e-3, "gan_discriminator_weight": 1e-2},
        "optimizer": {"generator_lr": 1e-3, "fake_score_lr": 1e-3, "warmup_steps": 2},
        "training": {"num_steps": 6, "batch_size": 4, "generator_every": 2, "seed": 3},
        "compute": {"device": "cpu", "precision": "fp32"},
        "run": {
            "folder": str(folder), "log_every": 2, "sample_every": 100, "checkpoint_every": 2,
            "sample_images": 4,
        },
    }  # fmt: skip
    return parse_settings(TrainSettings, _merged(values, changes), "test")


def tiny_pretrain_settings(pictures: Path, folder: Path, **changes: dict[str, Any]) -> PretrainSettings:
    """A tiny class-conditional teacher on 16x16 grey pictures."""
    values: dict[str, dict[str, Any]] = {
        "network": {"name": "tiny", "img_resolution": 16, "img_channels": 1, "label_dim": 4, "label_dropout": 0.1},
        "data": {"images": str(pictures), "flip": True},
        "training": {"num_steps": 4, "batch_size": 4, "seed": 1},
        "compute": {"device": "cpu", "precision": "fp32"},
        "run": {
            "folder": str(folder), "log_every": 2, "sample_every": 100, "checkpoint_every": 2,
            "sample_images": 4,
        },
    }  # fmt: skip
    return parse_settings(PretrainSettings, _merged(values, changes), "test")


def _merged(values: dict[str, dict[str, Any]], changes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {section: {**values.get(section, {}), **changes.get(section, {})} for section in {**values, **changes}}
