"""Class-conditional generators as folders of ours, and back in EDM's layout."""

from collections.abc import Mapping
from pathlib import Path

import torch

from fewstep.formats.casting import cast_weights
from fewstep.formats.model_folder import write_model_folder
from fewstep.models.model import Model


def export_class_folder(
    folder: Path, generator: Model, name: str, dtype: torch.dtype, header: Mapping[str, str]
) -> None:
    """A folder that `load_generator` reads and `load_pipeline` makes pictures with."""
    weights = cast_weights(generator.denoiser.state_dict(), dtype)
    write_model_folder(folder, generator.denoiser.describe(), weights, generator.card, dtype)


def export_edm_pickle(folder: Path, generator: Model, name: str, dtype: torch.dtype, header: Mapping[str, str]) -> None:
    """`<name>.pkl`, as the code that the network's authors published reads it."""
    generator.family.write_original(folder / f"{name}.pkl", generator.denoiser, dtype)
