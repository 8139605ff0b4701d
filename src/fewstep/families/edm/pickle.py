"""EDM networks in the format of EDM's own code."""

from pathlib import Path

import torch

from fewstep.errors import UserError
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.formats.casting import cast_weights
from fewstep.formats.edm_pickle_writer import write_edm_pickle


def write_edm_file(path: Path, denoiser: EDMDenoiser, dtype: torch.dtype) -> None:
    """A .pkl with EDM's own names for the constructor's arguments; inverse of `folder.describe_edm_arguments`.

    Raises:
        UserError: EDM's networks cannot be this one, or a weight becomes infinite in `dtype`.
    """
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
    write_edm_pickle(path, cast_weights(denoiser.state_dict(), dtype), kwargs)
