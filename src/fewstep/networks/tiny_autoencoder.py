"""TAESD: a tiny decoder that shows latents in a fraction of the VAE's time and memory."""

from pathlib import Path

import huggingface_hub

from fewstep.errors import UserError
from fewstep.formats.hub_faults import hub_reason
from fewstep.formats.json_files import read_json_object
from fewstep.formats.source import Source
from fewstep.networks.autoencoder import Autoencoder, load_autoencoder

_CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


def load_tiny_autoencoder(source: str | Path) -> Autoencoder:
    """A TAESD in diffusers' layout (`AutoencoderTiny`), float32, in the place of a model's own VAE.

    It decodes the model's own latents, without the VAE's scaling and shift: its config says 1 and 0, as it does
    for `pipe.vae = AutoencoderTiny(...)` in diffusers.

    Args:
        source: a folder with config.json and diffusion_pytorch_model.safetensors, or a hub id such as
            "madebyollin/taesd" (Stable Diffusion 1.x, 2.x), "madebyollin/taesdxl" or "madebyollin/taesd3".

    Raises:
        UserError: neither, a damaged one, or another kind of autoencoder; names it.
    """
    folder = _resolve(source)
    if not (folder / _CONFIG).is_file():
        raise UserError(f"{source} is no TAESD in diffusers' layout: {_CONFIG} is missing")
    if read_json_object(folder / _CONFIG).get("_class_name") != "AutoencoderTiny":
        raise UserError(
            f"{source} is no TAESD: its {_CONFIG} does not name AutoencoderTiny; e.g. madebyollin/taesd is one"
        )
    return load_autoencoder(folder)


def check_tiny_autoencoder(tiny: Autoencoder, source: str | Path, latent_channels: int, factor: int) -> None:
    """Refuse one that was made for another model family's latents.

    Args:
        latent_channels: channels of the model's latents (4: Stable Diffusion and SDXL, 16: SD 3).
        factor: pixels a side of the model's latents stands for.

    Raises:
        UserError: channels or factor differ.
    """
    if (tiny.latent_channels, tiny.factor) != (latent_channels, factor):
        raise UserError(
            f"{source} decodes latents of {tiny.latent_channels} channels {tiny.factor}x, this model makes "
            f"{latent_channels} channels {factor}x; take the TAESD of its family (taesd, taesdxl, taesd3)"
        )


def _resolve(source: str | Path) -> Path:
    place = Source.parse(source)
    if place.path is None:
        return _download(place.hub_id)
    if not place.path.is_dir():
        raise UserError(f"{source} is neither a folder nor a hub id (org/name) of a TAESD, e.g. madebyollin/taesd")
    return place.path / "vae" if (place.path / "vae").is_dir() else place.path


def _download(name: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[_CONFIG, _WEIGHTS]))
    except Exception as error:  # the hub's client raises many kinds; all mean the same to a user
        raise UserError(
            f"{name} is no local folder and cannot be fetched from the hub ({hub_reason(error)}); "
            "check the name and the network, or download it and give the folder"
        ) from error
