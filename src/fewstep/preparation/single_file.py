"""A single-file checkpoint becomes a diffusers folder, so that it can be a teacher."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor

from fewstep.errors import UserError, first_line
from fewstep.families.registry import family_named, recognise, single_file_layouts, unread_files
from fewstep.formats.atomic import written_aside
from fewstep.formats.diffusers_index import read_json, read_model_index
from fewstep.formats.few_step_names import predicts_v_by_name, titles
from fewstep.formats.hub_faults import hub_reason
from fewstep.formats.model_links import refuse_foreign_links
from fewstep.formats.single_file import SingleFile, read_single_file
from fewstep.formats.source import Source
from fewstep.formats.stated_facts import ZERO_SNR_MARKER
from fewstep.formats.tensor_files import write_tensor_file
from fewstep.networks.components import published_names
from fewstep.networks.untrained import build_untrained

_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")  # not in single files, not needed by a teacher
_COPIED = ("tokenizer", "tokenizer_2", "scheduler")
_CONFIGS = ["*.json", "*.txt", "*.model"]
_LATENT_SCALE, _SAME_SCALE = 0.18215, 2e-3  # what diffusers takes where a config has none; relative
_SAME_SCHEDULE = 2e-3  # alphas_cumprod in a half-precision file against the scheduler's
_WEIGHTS, _TEXT_WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"


def read_model_file(path: Path) -> SingleFile:
    """A whole model in one file, in any layout that a family has; see `formats.single_file.read_single_file`."""
    return read_single_file(path, single_file_layouts(), unread_files())


def single_file_to_folder(
    path: Path, config_folder: str | Path, out: Path, note: Callable[[str], None] = lambda line: None
) -> Path:
    """Write a diffusers folder with the weights of a single file.

    Args:
        path: a .safetensors in a layout that some family has (a .ckpt where it holds nothing but tensors).
        config_folder: a diffusers folder of the same family (its configs, tokenizers and scheduler are taken; it
            needs no weights), or a hub id, of which only those are downloaded. Components that the file lacks are
            taken from it whole.
        out: the new folder. It takes the place of nothing.
        note: is told what was taken from elsewhere, in words.

    Returns:
        `out`.

    Raises:
        UserError: an unreadable file, another network than the configs say, `out` exists, writing fails.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise UserError(f"{out} exists already; choose another folder")
    single = read_model_file(Path(path))
    base = _config_folder(config_folder, single.absent)
    if (family := recognise(base)).name != single.layout.family:
        title = family_named(single.layout.family).title
        raise UserError(f"{path} is {title}, but the configs of {config_folder} are {family.title}'s")
    configs = {name: read_json(base / name / "config.json", base, name) for name in single.parts}
    if single.skipped_layers:
        single = _without_last_layers(single, configs)
        note(
            f"its text encoder without the last {single.skipped_layers} of its layers, as {single.path.name} says (clip skip)"
        )
    states = {name: _state(single, name, config, base) for name, config in configs.items()}
    scheduler = _own_scheduler(single, read_json(base / "scheduler/scheduler_config.json", base, "scheduler"))
    _check_schedule(single, scheduler, base)
    _check_scale(single, read_json(base / "vae/config.json", base, "vae"), base)
    borrowed = {name: _weights_file(base, name, single) for name in single.absent}
    index = read_json(base / "model_index.json", base, "model_index")
    with written_aside(out) as aside:
        for name in _COPIED:
            if (base / name).is_dir():
                for path in (base / name, *(base / name).rglob("*")):
                    refuse_foreign_links(path, base)
                shutil.copytree(base / name, aside / name)
        (aside / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler, indent=1), encoding="utf-8")
        for name, state in states.items():
            (aside / name).mkdir()
            (aside / name / "config.json").write_text(json.dumps(configs[name], indent=1), encoding="utf-8")
            write_tensor_file(aside / name / _weights_name(name), state, {"format": "pt"})
        for name, source in borrowed.items():
            (aside / name).mkdir()
            shutil.copyfile(base / name / "config.json", aside / name / "config.json")
            shutil.copyfile(source, aside / name / _weights_name(name))
        (aside / "model_index.json").write_text(json.dumps(_own_index(index), indent=1), encoding="utf-8")
    if single.has_averages:
        note("the weights as they were trained, not their averages (model_ema.*), as other programs read such a file")
    if borrowed:
        note(f"{' and '.join(borrowed)} of {config_folder}, because {single.path.name} has none")
    return out


def _state(single: SingleFile, name: str, config: dict[str, Any], base: Path) -> dict[str, Tensor]:
    """One component's state dict under the names that diffusers or transformers publishes."""
    network = _network(single.layout.classes[name], config, base / name)
    tensors = published_names(network.state_dict(), type(network).__name__)
    shapes = {key: value.shape for key, value in tensors.items()}
    return single.diffusers_state(name, {} if _is_text_encoder(name) else dict(network.config), shapes)


def _weights_file(base: Path, name: str, single: SingleFile) -> Path:
    """A component's weights in the base, in full or half precision."""
    stem = _weights_name(name).removesuffix(".safetensors")
    files = [base / name / f"{stem}{variant}.safetensors" for variant in ("", ".fp16")]
    found = next((path for path in files if path.is_file()), None)
    for path in (base / name / "config.json", found or base / name):
        refuse_foreign_links(path, base)
    if found is None:
        raise UserError(
            f"{single.path} has no {name}, and {base / name} no weights to take in its place ({files[0].name}); give a "
            "--base that has them"
        )
    return found


def _without_last_layers(single: SingleFile, configs: dict[str, dict[str, Any]]) -> SingleFile:
    """The file without the text encoder's layers that it says are not used, of which its config then says nothing either."""
    config = configs.get("text_encoder")
    left = 0 if config is None else int(config.get("num_hidden_layers", 0)) - single.skipped_layers
    if config is None or left < 1:
        raise UserError(
            f"{single.path} leaves out {single.skipped_layers} layers of a text encoder that it does not have; remove "
            "modelspec.encoder_layer from its header"
        )
    config["num_hidden_layers"] = left
    dropped = tuple(f"encoder.layers.{number}." for number in range(left, left + single.skipped_layers))
    kept = {key: value for key, value in single.parts["text_encoder"].items() if not key.startswith(dropped)}
    return replace(single, parts={**single.parts, "text_encoder": kept})


def _refuse_other_prediction(single: SingleFile, scheduler: dict[str, Any], base: Path) -> None:
    """Raise UserError for a file that predicts v by its names where neither it nor the base's scheduler says so."""
    said = scheduler.get("prediction_type", "epsilon")
    named = next((name for name in (single.path.name, *titles(single.metadata)) if predicts_v_by_name(name)), "")
    if named and said != "v_prediction" and not single.prediction_type:
        raise UserError(
            f"{single.path} predicts v by its name ({named[:100]!r}), and nothing in it nor in {base / 'scheduler/scheduler_config.json'} "
            f"({said}) says so: give a --base whose scheduler has prediction_type=v_prediction, or rename it if its name is wrong"
        )


def _check_schedule(single: SingleFile, scheduler: dict[str, Any], base: Path) -> None:
    """Refuse a file whose own prediction or noise schedule is another than its folder's scheduler will say."""
    _refuse_other_prediction(single, scheduler, base)
    try:
        expected = single.layout.alphas_cumprod(scheduler)
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"{base / 'scheduler/scheduler_config.json'} describes no schedule: {first_line(error)}"
        ) from error
    found = single.alphas_cumprod
    if found is None:
        return
    if found.shape != expected.shape or not bool(((found.float() - expected.float()).abs() < _SAME_SCHEDULE).all()):
        raise UserError(
            f"{single.path}: its noise schedule (alphas_cumprod) is another than that of the base's scheduler; give a "
            "--base whose scheduler has it (beta_start, beta_end, beta_schedule, rescale_betas_zero_snr)"
        )


def _check_scale(single: SingleFile, config: dict[str, Any], base: Path) -> None:
    """Refuse a file whose latents are of another scale than its VAE's config will say."""
    found, expected = single.scale_factor, config.get("scaling_factor", _LATENT_SCALE)
    if found is not None and not (
        isinstance(expected, int | float) and abs(found - expected) < _SAME_SCALE * abs(found)
    ):
        raise UserError(
            f"{single.path}: its latents are multiplied by {found:.5g} (scale_factor), those of {base / 'vae/config.json'} by "
            f"{str(expected)[:40]} (scaling_factor); give a --base whose VAE has it"
        )


def _config_folder(source: str | Path, absent: Sequence[str]) -> Path:
    place = Source.parse(source)
    if place.path is not None:
        if not place.path.exists():
            raise UserError(
                f"{source} does not exist and is not a hub id (org/name); give a diffusers folder or a hub id"
            )
        read_model_index(place.path)
        return place.path
    try:
        weights = [f"{name}/*.safetensors" for name in absent]
        return Path(snapshot_download(place.hub_id, allow_patterns=[*_CONFIGS, *weights]))
    except Exception as error:  # the hub's client raises many kinds; all mean the same to a user
        raise UserError(
            f"{source} is no local folder and its configs cannot be fetched from the hub "
            f"({hub_reason(error)}); download it and give the folder"
        ) from error


def _is_text_encoder(name: str) -> bool:
    return name.startswith("text_encoder")


def _weights_name(name: str) -> str:
    """What a component's weights are called in a diffusers folder."""
    return _TEXT_WEIGHTS if _is_text_encoder(name) else _WEIGHTS


def _network(class_name: str, config: dict[str, Any], folder: Path) -> Any:
    """The untrained network of a component's config, on the meta device."""
    try:
        if _is_text_encoder(folder.name):
            kind: Any = getattr(transformers, class_name)
            return build_untrained(lambda: kind(kind.config_class.from_dict(config)))
        kind = getattr(diffusers, class_name)
        return build_untrained(lambda: kind.from_config(config))
    except Exception as error:  # a wrong value ends in any kind; all mean the same to a user
        raise UserError(f"{folder / 'config.json'} describes no network ({first_line(error)})") from error


def _own_scheduler(single: SingleFile, config: dict[str, Any]) -> dict[str, Any]:
    """The base's scheduler config with what the file says of its prediction and its noise schedule."""
    own = dict(config)
    if single.prediction_type:
        own["prediction_type"] = single.prediction_type
    if single.zero_snr and own.get("prediction_type") != "v_prediction":
        raise UserError(
            f"{single.path}: its tensor {ZERO_SNR_MARKER} says that the last noise level has no signal, where no picture follows "
            "from epsilon; a model that predicts v has v_pred beside it"
        )
    if single.zero_snr:  # its last step has no signal, so sampling must begin there
        own |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return own


def _own_index(index: dict[str, Any]) -> dict[str, Any]:
    """The base's model_index.json without the components that a single file has not."""
    own = {name: [None, None] if name in _LEFT_OUT else value for name, value in index.items()}
    if "safety_checker" in own:
        own["requires_safety_checker"] = False
    return own
