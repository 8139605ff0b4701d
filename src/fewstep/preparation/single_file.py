"""A single-file checkpoint becomes a diffusers folder, so that it can be a teacher."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import snapshot_download
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fewstep.errors import UserError
from fewstep.families.registry import recognise
from fewstep.formats.atomic import written_aside
from fewstep.formats.diffusers_index import read_json, read_model_index
from fewstep.formats.single_file import SingleFile, read_single_file
from fewstep.formats.tensor_files import write_tensor_file
from fewstep.networks.components import published_names

_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")  # not in single files, not needed by a teacher
_COPIED = ("tokenizer", "tokenizer_2", "scheduler")
_CONFIGS = ["*.json", "*.txt", "*.model"]
_WEIGHTS = {"unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors"}
_TEXT_ENCODERS: dict[str, Any] = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
_NAMES = {"sd": "Stable Diffusion 1.x", "sdxl": "SDXL", "sd3": "Stable Diffusion 3"}


def single_file_to_folder(path: Path, config_folder: str | Path, out: Path) -> Path:
    """Write a diffusers folder with the weights of a single file.

    Args:
        path: a .safetensors with LDM keys (a .ckpt where it holds nothing but tensors).
        config_folder: a diffusers folder of the same family (its configs, tokenizers and scheduler are taken; it
            needs no weights), or a hub id, of which only those are downloaded.
        out: the new folder. It takes the place of nothing.

    Returns:
        `out`.

    Raises:
        UserError: an unreadable file, another network than the configs say, `out` exists, writing fails.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise UserError(f"{out} exists already; choose another folder")
    single = read_single_file(Path(path))
    base = _config_folder(config_folder)
    if (family := recognise(base).name) != single.family:
        raise UserError(f"{path} is {_NAMES[single.family]}, but the configs of {config_folder} are {_NAMES[family]}'s")
    configs = {name: read_json(base / name / "config.json", base, name) for name in single.parts}
    states = {}
    for name, config in configs.items():
        network = _network(name, config, base)
        tensors = published_names(network.state_dict(), type(network).__name__)
        shapes = {key: value.shape for key, value in tensors.items()}
        states[name] = single.diffusers_state(name, dict(network.config) if name in _WEIGHTS else {}, shapes)
    index = read_json(base / "model_index.json", base, "model_index")
    with written_aside(out) as aside:
        for name in _COPIED:
            if (base / name).is_dir():
                shutil.copytree(base / name, aside / name)
        _say_prediction(single, aside / "scheduler/scheduler_config.json")
        for name, state in states.items():
            (aside / name).mkdir()
            (aside / name / "config.json").write_text(json.dumps(configs[name], indent=1), encoding="utf-8")
            write_tensor_file(aside / name / _WEIGHTS.get(name, "model.safetensors"), state, {"format": "pt"})
        (aside / "model_index.json").write_text(json.dumps(_own_index(index), indent=1), encoding="utf-8")
    return out


def _config_folder(source: str | Path) -> Path:
    folder = Path(source).expanduser()
    if folder.exists():
        read_model_index(folder)
        return folder
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise UserError(f"{source} does not exist and is no hub id (org/name); give a diffusers folder or a hub id")
    try:
        return Path(snapshot_download(str(source), allow_patterns=_CONFIGS))
    except Exception as error:  # the hub's client raises many kinds; all mean the same to a user
        raise UserError(
            f"{source} is no local folder and its configs cannot be fetched from the hub "
            f"({str(error).splitlines()[0]}); download it and give the folder"
        ) from error


def _network(name: str, config: dict[str, Any], base: Path) -> Any:
    """The untrained network of a config, on the meta device."""
    try:
        with torch.device("meta"):
            if name in _TEXT_ENCODERS:
                return _TEXT_ENCODERS[name](CLIPTextConfig.from_dict(config))
            return (UNet2DConditionModel if name == "unet" else AutoencoderKL).from_config(config)
    except Exception as error:  # a wrong value ends in any kind; all mean the same to a user
        raise UserError(f"{base / name / 'config.json'} describes no network ({str(error).splitlines()[0]})") from error


def _say_prediction(single: SingleFile, path: Path) -> None:
    """What the file's header says of its prediction goes before the base's config."""
    if not single.prediction_type or not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "prediction_type": single.prediction_type}, indent=1), encoding="utf-8")


def _own_index(index: dict[str, Any]) -> dict[str, Any]:
    """The base's model_index.json without the components that a single file has not."""
    own = {name: [None, None] if name in _LEFT_OUT else value for name, value in index.items()}
    if "safety_checker" in own:
        own["requires_safety_checker"] = False
    return own
