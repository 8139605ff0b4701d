"""The tiny text-to-image networks alone, with random conditions, so that tests of them need no text encoder."""

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fewstep.diffusion.condition import Condition, Empty
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.families.registry import recognise
from tests.tiny_models import tiny_sd3_folder, tiny_sd_folder, tiny_sdxl_folder

FAMILIES = ("sd", "sdxl", "sd3")
_MAKERS: dict[str, Any] = {"sd": tiny_sd_folder, "sdxl": tiny_sdxl_folder, "sd3": tiny_sd3_folder}
_WIDTHS = {"sd": (32, 0), "sdxl": (64, 24), "sd3": (64, 48)}  # of text and pooled embeddings


@functools.cache
def _loaded(family: str, prediction_type: str, resolution: int) -> DiffusersDenoiser:
    options = {"prediction_type": prediction_type} if prediction_type else {}
    with tempfile.TemporaryDirectory() as place:
        folder = _MAKERS[family](Path(place) / family, **options)
        return cast(DiffusersDenoiser, recognise(folder).load(folder, resolution).eval())


def tiny_text_denoiser(family: str, prediction_type: str = "", *, resolution: int = 0) -> DiffusersDenoiser:
    """A fresh copy of the family's tiny network; the default predicts epsilon (SD 3: flow) on 8x8 latents."""
    return copy.deepcopy(_loaded(family, prediction_type, resolution))


def tiny_condition(family: str, size: int = 2, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Condition:
    """Random embeddings; the unconditional branch is zeros for SDXL and another random row for the others."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    text_width, pooled_width = _WIDTHS[family]
    values: dict[str, Tensor] = {"text": random(size, 5, text_width)}
    if pooled_width:
        values["pooled"] = random(size, pooled_width)
    rows: dict[str, Empty] = {}
    for name, part in values.items():
        row = random(1, *part.shape[1:])
        rows[name] = torch.zeros_like(row) if family == "sdxl" else row
    if family == "sdxl":
        values["time_ids"] = (
            torch.tensor([[16, 16, 0, 0, 16, 16], [24, 16, 2, 1, 16, 24]]).repeat(size, 1)[:size].to(dtype)
        )
        rows["time_ids"] = "same"
    return Condition(size, values, rows)


def some_levels(denoiser: DiffusersDenoiser, *indices: int) -> Tensor:
    """The levels at these grid indices."""
    return denoiser.noise_schedule.at(torch.tensor(indices))
