"""Sample pictures of a run: large ones are made and decoded one by one, and look as they do together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep import devices
from fewstep.devices import pictures_at_once
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.networks.autoencoder import Autoencoder
from fewstep.settings import TrainSettings, parse_settings
from fewstep.training.run import train
from tests.tiny_models import tiny_sdxl_folder


@pytest.mark.parametrize(
    ("side", "count"), [(2048, 1), (1024, 1), (768, 1), (725, 1), (724, 2), (512, 4), (256, 16), (64, 256)]
)
def test_how_many_pictures_are_made_at_once(side: int, count: int) -> None:
    assert pictures_at_once(side, side) == count


def settings(model: Path, folder: Path) -> TrainSettings:
    return parse_settings(
        TrainSettings,
        {
            "teacher": {"path": str(model), "guidance_scale": 3.0}, "generator": {"step_indices": [999, 499]},
            "data": {"prompts": str(model.parent / "prompts.txt")}, "memory": {"mode": "shared_base", "lora_rank": 4},
            "training": {"num_steps": 1, "batch_size": 1},
            "compute": {"device": "cpu", "precision": "fp32"},
            "run": {"folder": str(folder), "sample_images": 3},
        },
        "test",
    )  # fmt: skip


def test_large_pictures_are_made_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks and decoder see one picture at a time, its unconditional twin beside it; every grid is the same."""
    model = tiny_sdxl_folder(tmp_path / "sdxl")
    (tmp_path / "prompts.txt").write_text("red cat\na dog\ncat\n")
    decoded: list[int] = []
    forwards: list[int] = []
    decode, forward = Autoencoder.decode, DiffusersDenoiser.forward

    def watch_decode(self: Autoencoder, latents: Tensor) -> Tensor:
        decoded.append(len(latents))
        return decode(self, latents)

    def watch_forward(self: DiffusersDenoiser, noisy: Tensor, *rest: Any) -> Any:
        forwards.append(len(noisy))
        return forward(self, noisy, *rest)

    monkeypatch.setattr(Autoencoder, "decode", watch_decode)
    monkeypatch.setattr(DiffusersDenoiser, "forward", watch_forward)
    train(settings(model, tmp_path / "together"))
    assert (max(decoded), max(forwards)) == (8, 6)  # five estimates of three pictures, eight at a time; three guided
    decoded.clear()
    forwards.clear()
    monkeypatch.setattr(devices, "_PIXELS_AT_ONCE", 16 * 16)
    train(settings(model, tmp_path / "single"))
    assert (set(decoded), max(forwards)) == ({1}, 2)
    names = sorted(path.name for path in (tmp_path / "together/samples").iterdir())
    assert len(names) == 5  # generator, teacher, both scores, prompts
    for name in names:
        first, second = tmp_path / "together/samples" / name, tmp_path / "single/samples" / name
        if first.suffix == ".txt":
            assert first.read_text() == second.read_text()
            continue
        pixels = [np.asarray(Image.open(path)).astype(int) for path in (first, second)]
        assert pixels[0].std() > 5
        assert np.abs(pixels[0] - pixels[1]).max() <= 1, name


def test_measured_images_do_not_depend_on_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.training.build import open_teacher
    from fewstep.training.distill import DistillationJob

    model = tiny_sdxl_folder(tmp_path / "sdxl")
    (tmp_path / "prompts.txt").write_text("red cat\na dog\ncat\n")
    chosen = settings(model, tmp_path / "run")
    job = DistillationJob(chosen, open_teacher(chosen))
    whole = job.sample_images(7, 4, seed=2)
    monkeypatch.setattr(devices, "_PIXELS_AT_ONCE", 16 * 16 * 3)
    assert (job.sample_images(7, 4, seed=2) - whole).abs().max() < 1e-4
    assert (job.sample_images(9, 1, seed=2) - whole[2:3]).abs().max() < 1e-4
    assert torch.is_tensor(whole)
    assert (whole[0] - whole[3]).abs().max() > 1e-2
