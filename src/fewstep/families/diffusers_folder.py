"""Teachers in diffusers' own format: find the folder, know the family, load its network."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel, UNet2DConditionModel

from fewstep.errors import UserError
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.families.sd3.denoiser import SD3Denoiser
from fewstep.families.stable_diffusion.denoiser import DiffusersUNetDenoiser, plain_config
from fewstep.formats.bundled import resolve_path
from fewstep.networks.components import load_component
from fewstep.networks.text_encoders import TextEncoders, read_model_index

_KINDS: dict[str, Any] = {
    "sd": (DiffusersUNetDenoiser, UNet2DConditionModel, "unet"),
    "sdxl": (DiffusersUNetDenoiser, UNet2DConditionModel, "unet"),
    "sd3": (SD3Denoiser, SD3Transformer2DModel, "transformer"),
}

_FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")


def resolve_model_folder(source: str | Path) -> Path:
    """A local or bundled diffusers folder as it is; a hub id ("org/name") downloaded to the hub's cache, safetensors only.

    Raises:
        UserError: none of these; or the download fails.
    """
    folder = resolve_path(source)
    if folder.exists():
        read_model_index(folder)
        return folder
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise UserError(f"{source} does not exist and is no hub id (org/name); give a diffusers folder or a hub id")
    try:
        return Path(DiffusionPipeline.download(str(source), use_safetensors=True))
    except Exception as error:  # the hub's client raises many kinds; all mean the same to a user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{source} is no local folder and cannot be fetched from the hub ({reason}); "
            "check the name and the network, or download it and give the folder"
        ) from error


def is_diffusers_folder(path: Path) -> bool:
    """Whether a folder has diffusers' index and a text-to-image network (our class-conditional exports have none)."""
    return (path / "model_index.json").is_file() and any(
        name.startswith("text_encoder") for name in read_model_index(path)
    )


def model_family(folder: Path) -> str:
    """ "sd" (Stable Diffusion 1.x, 2.x), "sdxl" or "sd3", from the network's own config.

    Raises:
        UserError: a family this library does not have, or a missing component.
    """
    index = read_model_index(folder)
    name = "transformer" if "transformer" in index else "unet"
    if name not in index:
        raise UserError(
            f"{folder} is no text-to-image model this library knows: its index names no unet or transformer"
        )
    config = read_json(folder / name / "config.json", folder, name)
    kind = config.get("_class_name")
    if kind == "SD3Transformer2DModel":
        return "sd3"
    if kind != "UNet2DConditionModel":
        raise UserError(
            f"{folder}: a network of class {kind} is not supported; UNet2DConditionModel and SD3Transformer2DModel are"
        )
    return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd"


def has_guidance_built_in(folder: Path) -> bool:
    """Whether a folder's scheduler is one of few-step models, as our own exports have: their guidance is distilled in.

    Networks that take guidance as an input are refused on loading. What says nothing (SDXL-Turbo has the config and a
    scheduler of SDXL) cannot be told from a model to be guided.
    """
    scheduler = read_json(folder / "scheduler/scheduler_config.json", folder, "scheduler")
    return scheduler.get("_class_name") in _FEW_STEP_SCHEDULERS


def load_diffusers_denoiser(folder: Path, resolution: int = 0) -> DiffusersDenoiser:
    """The network of a diffusers folder as a Denoiser, float32.

    Args:
        resolution: side of the pictures in pixels; 0 takes the model's own.

    Raises:
        UserError: a component is missing or damaged, a family, prediction type or resolution that does not fit.
    """
    denoiser, network, name = _KINDS[model_family(folder)]
    scheduler = read_json(folder / "scheduler/scheduler_config.json", folder, "scheduler")
    size = 0
    if resolution:
        factor = latent_factor(folder)
        if resolution % factor:
            raise UserError(f"teacher.resolution={resolution} is no multiple of the VAE's factor {factor}")
        size = resolution // factor
    weights = load_component(network, folder / name)
    try:
        return denoiser(weights.float(), plain_config(scheduler), size)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{folder}: {error}") from error


def describe_diffusers_folder(folder: Path, resolution: int = 0) -> dict[str, Any]:
    """The description from which the catalog builds the same network untrained, without reading weights."""
    denoiser, network, name = _KINDS[model_family(folder)]
    with torch.device("meta"):
        untrained = network.from_config(read_json(folder / name / "config.json", folder, name))
        size = resolution // latent_factor(folder) if resolution else 0
    return denoiser(
        untrained, plain_config(read_json(folder / "scheduler/scheduler_config.json", folder, "scheduler")), size
    ).describe()


def load_text_encoders(folder: Path) -> TextEncoders:
    """The text encoders of a diffusers folder."""
    return TextEncoders(folder, model_family(folder))


def read_json(path: Path, folder: Path, component: str) -> dict[str, Any]:
    """A component's config; raises UserError naming the component."""
    if not path.is_file():
        raise UserError(
            f"{folder} is incomplete: its component {component} is missing ({path.name}); download it again"
        )
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); download the model again") from error


def latent_factor(folder: Path) -> int:
    """Pixels a latent side stands for, from the VAE's config."""
    config = read_json(folder / "vae/config.json", folder, "vae")
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels") or [0] * 4
    return int(2 ** (len(blocks) - 1))
