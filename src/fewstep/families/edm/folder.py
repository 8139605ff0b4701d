"""EDM networks on disk: our own model folders, and EDM's pickles, of which nothing is executed."""

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError, first_line
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.formats.compare import state_difference
from fewstep.formats.edm_pickle import EDMPickle, read_edm_pickle
from fewstep.formats.model_folder import CONFIG, ModelCard, read_card, read_model_folder
from fewstep.formats.tensor_files import refuse_infinities
from fewstep.networks.untrained import build_untrained

_ARGUMENTS = {
    "img_resolution", "img_channels", "label_dim", "model_channels", "channel_mult", "channel_mult_emb",
    "num_blocks", "attn_resolutions", "dropout", "augment_dim", "embedding_type", "encoder_type",
    "channel_mult_noise", "resample_filter",
}  # fmt: skip
# Arguments that change nothing about a trained network's own forward, with the values under which that is so; None: any
_UNREAD: dict[str, tuple[object, ...] | None] = {
    "model_type": None, "sigma_data": None, "use_fp16": None, "label_dropout": None, "decoder_type": ("standard",),
    "sigma_min": (0,), "sigma_max": (math.inf,),
}  # fmt: skip
_FAMILIES = {"DhariwalUNet": "adm", "SongUNet": "song"}


def is_edm_folder(path: Path) -> bool:
    """Whether a path is a .pkl file, or a folder whose network is one of ours."""
    if path.is_file():
        return path.suffix.lower() == ".pkl"
    try:
        description = json.loads((path / CONFIG).read_text(encoding="utf-8"))["description"]
        return bool(description["family"] == "edm")
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def load_edm(path: Path) -> Denoiser:
    """The network of a model folder or an EDM pickle, float32.

    Raises:
        UserError: damaged, or another network than it describes.
    """
    if path.is_file():
        pickle = _read_pickle(path)
        return _with_weights(describe_edm_arguments(pickle.init_kwargs), pickle.state_dict, path)
    description, weights, _ = read_model_folder(path)
    return _with_weights(description, weights, path)


def describe_edm_folder(path: Path) -> dict[str, Any]:
    """The description of the network in a model folder or an EDM pickle; errors as `load_edm`."""
    if path.is_file():
        return describe_edm_arguments(_read_pickle(path).init_kwargs)
    return read_card(path)[0]


def read_edm_card(path: Path) -> ModelCard:
    """What a model folder says of itself; of a pickle, that it is a teacher."""
    return ModelCard(role="teacher") if path.is_file() else read_card(path)[1]


def describe_edm_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Our description of an EDM preconditioning module from its constructor arguments.

    Raises:
        UserError: a network family this library does not have, or an argument that it does not know; names it.
    """
    for name, value in arguments.items():
        if name not in _ARGUMENTS and (name not in _UNREAD or value not in (_UNREAD[name] or (value,))):
            raise UserError(f"EDM network with {name[:60]}={str(value)[:60]}, which this version does not understand")
    model_type = arguments.get("model_type", "DhariwalUNet")
    if model_type not in _FAMILIES or arguments.get("encoder_type") == "skip":
        raise UserError(f"EDM network {model_type!r} with encoder {arguments.get('encoder_type')!r} is not supported")
    network = {name: value for name, value in arguments.items() if name in _ARGUMENTS}
    defaults: dict[str, Any] = {"channel_mult": (1, 2, 3, 4), "model_channels": 192, "num_blocks": 3}
    if _FAMILIES[model_type] == "adm":
        network = {**defaults, "attn_resolutions": (32, 16, 8), "dropout": 0.1, **network}
    return {
        "family": "edm", "sigma_data": arguments.get("sigma_data", 0.5),
        "network": {"family": _FAMILIES[model_type], **network},
    }  # fmt: skip


def _read_pickle(path: Path) -> EDMPickle:
    if path.suffix.lower() != ".pkl":
        raise UserError(
            f"{path} is neither a model folder nor an EDM .pkl; `fewstep convert` makes folders of single files, LoRAs and other "
            "tools' weights"
        )
    pickle = read_edm_pickle(path)
    if pickle.class_name != "EDMPrecond":
        raise UserError(f"{path} holds a {pickle.class_name}; only EDM's own preconditioning (EDMPrecond) is supported")
    return pickle


def _with_weights(description: dict[str, Any], weights: dict[str, Tensor], path: Path) -> Denoiser:
    try:
        untrained = build_untrained(lambda: EDMDenoiser.from_description(description))
    except Exception as error:  # a wrong value ends in any kind; all mean the same to a user
        raise UserError(f"{path}: the description of the network is wrong: {first_line(error)}") from error
    if fault := state_difference(weights, untrained.state_dict()):  # before anything is allocated
        raise UserError(f"{path} holds another network than it describes: {fault}")
    refuse_infinities(weights, str(path))
    denoiser = EDMDenoiser.from_description(description)
    denoiser.load_state_dict({name: value.float() for name, value in weights.items()})
    return denoiser
