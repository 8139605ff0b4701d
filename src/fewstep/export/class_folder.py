"""Class-conditional generators as folders of ours, and back in EDM's layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch

from fewstep.errors import UserError
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.formats.casting import cast_weights
from fewstep.formats.edm_pickle_writer import write_edm_pickle
from fewstep.formats.model_folder import write_model_folder
from fewstep.models.model import Model


def export_class_folder(
    folder: Path, generator: Model, name: str, dtype: torch.dtype, header: Mapping[str, str]
) -> None:
    """A folder that `load_generator` reads and `load_pipeline` makes pictures with."""
    weights = cast_weights(generator.denoiser.state_dict(), dtype)
    write_model_folder(folder, generator.denoiser.describe(), weights, generator.card, dtype)


def export_edm_pickle(folder: Path, generator: Model, name: str, dtype: torch.dtype, header: Mapping[str, str]) -> None:
    """`<name>.pkl`: EDM's own names for the constructor's arguments; inverse of `generator.describe_edm_arguments`."""
    denoiser = cast(EDMDenoiser, generator.denoiser)  # the only family whose networks EDM's own code can read
    values = denoiser.config.to_dict()
    family, fold = values.pop("family"), values.pop("fold")
    if fold != 1:
        raise UserError(
            f"this network folds {fold}x{fold} pixels into channels (network.fold), which EDM's networks cannot: "
            "choose --as diffusers"
        )
    if family == "adm":  # arguments its class does not take; they are fixed there
        for argument in ("embedding_type", "encoder_type", "channel_mult_noise", "resample_filter"):
            values.pop(argument)
    kwargs = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    kwargs |= {"model_type": "DhariwalUNet" if family == "adm" else "SongUNet", "sigma_data": denoiser.sigma_data}
    write_edm_pickle(folder / f"{name}.pkl", cast_weights(denoiser.state_dict(), dtype), kwargs)
