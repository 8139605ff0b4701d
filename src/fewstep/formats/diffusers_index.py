"""The configs of a diffusers folder, read as JSON: what components there are and how each is described."""

from pathlib import Path
from typing import Any

from fewstep.errors import UserError
from fewstep.formats.json_files import read_json_object

INDEX = "model_index.json"
_MAX_HALVINGS = 10
# Numbers that decide how much is allocated and that no tensor of the file contradicts
_SIZES = {"num_train_timesteps": 100_000, "sample_size": 16_384, "pos_embed_max_size": 16_384}
SCHEDULER = "scheduler/scheduler_config.json"


def read_model_index(folder: Path) -> dict[str, Any]:
    """The components {name: [library, class]} of a diffusers folder that are present.

    Raises:
        UserError: not a diffusers folder, or a damaged index.
    """
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{folder} is not a diffusers model: {INDEX} is missing")
    index = read_json_object(path)
    wrong = [
        name
        for name, value in index.items()
        if isinstance(value, list) and (len(value) != 2 or not all(isinstance(part, str | None) for part in value))
    ]
    if wrong:
        raise UserError(f"{path} is damaged: {wrong[0]} is not [library, class]; download the model again")
    return {name: value for name, value in index.items() if isinstance(value, list) and value[0] is not None}


def refuse_foreign_code(folder: Path) -> None:
    """Raise UserError where an index names classes of other libraries: diffusers would look for their code beside it."""
    for name, value in read_model_index(folder).items():
        library = str(value[0])
        if library not in ("diffusers", "transformers") and not library.startswith("fewstep."):
            raise UserError(
                f"{folder}: its {name} is a class of {library!r}, and no code of a model folder is run here; "
                f"{INDEX} may name classes of diffusers and transformers"
            )


def read_json(path: Path, folder: Path, component: str) -> dict[str, Any]:
    """A component's config.

    Raises:
        UserError: it is missing or damaged; names the component.
    """
    if not path.is_file():
        raise UserError(
            f"{folder} is incomplete: its component {component} is missing ({path.name}); download it again"
        )
    config = read_json_object(path)
    for key, most in _SIZES.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or not 0 < value <= most):
            raise UserError(
                f"{path} is damaged: {key} is {str(value)[:40]}, not a whole number up to {most}; download the model again"
            )
    return config


def read_scheduler(folder: Path) -> dict[str, Any]:
    """The scheduler's config; errors as `read_json`."""
    return read_json(folder / SCHEDULER, folder, "scheduler")


def read_vae_config(folder: Path) -> dict[str, Any]:
    """The VAE's config; errors as `read_json`."""
    return read_json(folder / "vae/config.json", folder, "vae")


def vae_factor(config: dict[str, Any]) -> int:
    """Pixels a latent side stands for, from the VAE's config."""
    halvings = config.get("temperal_downsample")  # of VAEs of videos, in diffusers' spelling
    if halvings is not None:
        if not isinstance(halvings, list | tuple) or len(halvings) > _MAX_HALVINGS:
            raise UserError(
                "the config of the VAE is damaged: temperal_downsample is not a list; download the model again"
            )
        return int(2 ** len(halvings))
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels") or [0] * 4
    if not isinstance(blocks, list | tuple) or len(blocks) > _MAX_HALVINGS:
        raise UserError("the config of the VAE is damaged: block_out_channels is not a list; download the model again")
    return int(2 ** (len(blocks) - 1))
