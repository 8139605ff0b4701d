"""An LPIPS of random weights in files of the published ones' shapes, which looks at small pictures as they are."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewstep.networks import perceptual
from fewstep.networks.perceptual import LPIPS


def lpips_files(folder: Path) -> tuple[Path, Path]:
    """VGG16 and the heads, where `write_lpips` writes them."""
    return folder / "vgg.safetensors", folder / "heads.safetensors"


def write_lpips(folder: Path) -> tuple[Path, Path]:
    """Write both files; one seed's weights."""
    files = lpips_files(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = LPIPS(None).state_dict()
    save_file({key: value for key, value in weights.items() if key.startswith("features.")}, files[0])
    save_file({f"lin{n}.model.1.weight": weights[f"heads.{n}"] for n in range(5)}, files[1])
    return files


def small_pictures_stay(patch: pytest.MonkeyPatch) -> None:
    """Where nobody asks for a size, pictures are not enlarged: 224 pixels would cost the tests a second each."""
    patch.setattr(perceptual.load_lpips, "__defaults__", (None,))
