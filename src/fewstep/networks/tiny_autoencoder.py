"""TAESD: a tiny decoder that shows latents in a fraction of the VAE's time and memory."""

from pathlib import Path

from fewstep.errors import UserError
from fewstep.formats.json_files import read_json_object
from fewstep.networks.autoencoder import Autoencoder, load_autoencoder
from fewstep.networks.hub_folders import network_folder

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
    folder = network_folder(source, (_CONFIG, _WEIGHTS), "a TAESD", "madebyollin/taesd")
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
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
