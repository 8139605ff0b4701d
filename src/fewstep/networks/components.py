"""One component of a diffusers folder, whole: no tensor stays at its random start, and every failure is one sentence."""

import inspect
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.errors import UserError, first_line
from fewstep.formats.json_files import other_kind, read_json_object
from fewstep.formats.stored_tensors import StoredTensors, find_indexed, find_tensors
from fewstep.formats.tensor_files import refuse_infinities, refuse_no_weights, tensor_shapes
from fewstep.networks.untrained import build_untrained, num_values

_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
_SPARE = 1_000_000  # parameters that a network may have beyond twice those of its file
_CLIP, _WEIGHTS, _ADAPTER = "text_model.", "model.safetensors", "adapter_config.json"
_NAMES_DTYPE = int(transformers.__version__.partition(".")[0]) >= 5  # before, `torch_dtype`
_VARIANT = re.compile(r"(diffusion_pytorch_)?model(\.(?P<variant>[a-z]+\w*))?(-\d+-of-\d+)?\.safetensors")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the progress bars and reports of diffusers and transformers: what matters of them becomes an error here."""
    from transformers.utils import logging as theirs

    ours, shown = diffusers.utils.logging, theirs.is_progress_bar_enabled()
    handlers = [handler for name in ("diffusers", "transformers") for handler in logging.getLogger(name).handlers]
    ours.disable_progress_bar()
    theirs.disable_progress_bar()
    # and not the libraries' verbosity: a change of level makes every logger of the process look it up anew
    for handler in handlers:
        handler.addFilter(_nothing)
    try:
        yield
    finally:
        ours.enable_progress_bar()
        if shown:
            theirs.enable_progress_bar()
        for handler in handlers:
            handler.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def load_component(kind: Any, folder: Path) -> Any:
    """A network of diffusers or transformers from its folder, safetensors only.

    Both libraries leave tensors that the file lacks at random values, with a warning at most; here that is an error.

    Args:
        kind: its class.
        folder: with config.json and weights.

    Raises:
        UserError: no weights, damaged ones, or another network's; numbers among them that are none; names the folder and the
            tensors.
    """
    with _readable_config(kind, folder) as config:
        described = _num_described(kind, json.dumps(config, sort_keys=True))
    _check_files(folder, described)
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    if kind.__module__.startswith("transformers"):
        options["ignore_mismatched_sizes"] = True  # its own error does not name them; they are refused below
        options["trust_remote_code"] = False
        options["return_dict"] = True  # outputs by their names, whatever config.json says
        # each weight as the file has it: transformers 5 rounds it to the dtype that config.json names
        options["dtype" if _NAMES_DTYPE else "torch_dtype"] = torch.float32
    if variant := _only_variant(folder):
        options["variant"] = variant
    try:
        with quiet_loading():
            module, found = kind.from_pretrained(folder, **options)
    except Exception as error:  # a wrong value ends in any kind; all mean the same to a user
        raise UserError(f"{folder} cannot be loaded ({_reason(error)}); download it again") from error
    missing, other = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing and _load_short_names(module, folder, missing):
        missing, other = [], []
    missing += sorted(key if isinstance(key, str) else key[0] for key in found["mismatched_keys"])
    other = [key for key in other if missing or not _needless(key, module)]
    if missing:
        raise UserError(
            f"{folder} holds another network than its config.json describes: {len(missing)} missing or of another "
            f"shape {_shown(missing)}, {len(other)} unexpected {_shown(other)}; download it again"
        )
    if other:
        raise UserError(
            f"{folder}: no part of the network in its config.json takes {len(other)} of its tensors, e.g. {_shown(other)}; what "
            "they change is not known here: give the model without quantisation, adapters or added parts"
        )
    refuse_infinities(module.state_dict(), str(folder))
    return module


def find_component(folder: Path) -> StoredTensors:
    """The files that `load_component` reads of a network of diffusers, not read.

    Raises:
        UserError: a file is missing or damaged.
    """
    variant = [part for part in [_only_variant(folder)] if part]
    index = folder / ".".join([f"{_DIFFUSERS_WEIGHTS}.index", *variant, "json"])
    if index.is_file():
        return find_indexed(index)
    return find_tensors([folder / ".".join([*_DIFFUSERS_WEIGHTS.split(".")[:-1], *variant, "safetensors"])])


def _check_files(folder: Path, needed: int) -> None:
    """Raise UserError for weights files that cannot be those of a network of so many parameters, from their headers."""
    files = list(folder.glob("*.safetensors"))
    if not files and (pickles := sorted(path.name for path in folder.glob("*.bin"))):
        raise UserError(
            f"{folder} has its weights in {pickles[0]} alone, a pickle, and those of model folders are not read: download the "
            "model's .safetensors, or save it again with diffusers (safe_serialization=True)"
        )
    try:
        stored = sum(math.prod(shape) for path in files for shape in tensor_shapes(path).values())
        for path in files:
            refuse_no_weights(path)
    except UserError as error:
        if error.__cause__ is None:  # a sentence of its own
            raise
        raise UserError(f"{folder} cannot be loaded ({_reason(error.__cause__)}); download it again") from error
    if files and needed > 2 * stored + _SPARE:  # before anything is allocated
        raise UserError(
            f"{folder / 'config.json'} describes a network of {needed} parameters, its weights have {stored}; download it again"
        )


def _needless(key: str, module: Any) -> bool:
    """Whether a network computes the same without a tensor of its file that it did not take.

    Text encoders are published with more than is used of them: layers beyond those of the config, a vision tower, a
    decoder, a head. What belongs to a layer that is used, such as the scale of quantised weights, is another thing; and
    networks of diffusers have no spare parts.
    """
    if not type(module).__module__.startswith("transformers"):
        return False
    layer = key.removeprefix(_CLIP).rpartition(".")[0]
    return f"{layer}.weight" not in {name.removeprefix(_CLIP) for name in module.state_dict()}


def _shown(names: list[str]) -> list[str]:
    """Some of the names, which may be of any length."""
    return [name[:100] for name in names[:2]]


def load_tokenizer(kind: Any, folder: Path) -> Any:
    """A tokenizer of transformers from its folder.

    Args:
        kind: its class.

    Raises:
        UserError: files are missing or damaged; names the folder.
    """
    try:
        with quiet_loading():
            tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        longest = tokenizer.model_max_length
        if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 2:
            raise ValueError(f"model_max_length is {str(longest)[:40]}, not a number of tokens")
        return tokenizer
    except Exception as error:  # a wrong value ends in any kind; all mean the same to a user
        raise UserError(f"{folder} cannot be loaded ({_reason(error)}); download it again") from error


def _only_variant(folder: Path) -> str:
    """The variant ("fp16") that a folder's weights are stored in, where there are no plain ones; else empty."""
    found = [match for path in folder.glob("*.safetensors") if (match := _VARIANT.fullmatch(path.name))]
    variants = {match["variant"] or "" for match in found}
    if len(variants) > 1 and "" not in variants:
        raise UserError(f"{folder} holds its weights as {', '.join(sorted(variants))}; keep one of these variants")
    return "" if "" in variants or not variants else variants.pop()


def describe_component(kind: Any, folder: Path) -> Any:
    """The untrained network of a component's config, on the meta device; no memory goes into it.

    Raises:
        UserError: the config is missing, damaged, or describes no network of this class.
    """
    with _readable_config(kind, folder) as config:
        return _untrained(kind, config)


def _untrained(kind: Any, config: dict[str, Any]) -> Any:
    with quiet_loading():
        if kind.__module__.startswith("transformers"):
            return build_untrained(lambda: kind(kind.config_class.from_dict(config)))
        return build_untrained(lambda: kind.from_config(config))


@lru_cache(maxsize=64)
def _num_described(kind: Any, config: str) -> int:
    """Parameters of the network that a config, as JSON, describes; the same is loaded again and again."""
    return num_values(_untrained(kind, json.loads(config)))


@contextmanager
def _readable_config(kind: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """A component's config, whose settings are of the kinds that its class has; what goes wrong with it names the file."""
    config = read_json_object(folder / "config.json")
    if config.get("quantization_config"):
        raise UserError(
            f"{folder} is quantised (quantization_config in its config.json), which is not read; give the model in float16, "
            "bfloat16 or float32"
        )
    _refuse_code_from_elsewhere(kind, folder, config)
    for name, default in _defaults(kind).items():
        if name in config and (wanted := other_kind(config[name], default)):
            raise UserError(
                f"{folder / 'config.json'} is damaged: {name} is {str(config[name])[:60]}, not {wanted}; download it again"
            )
    try:
        yield config
    except Exception as error:  # a wrong value ends in any kind; all mean the same to a user
        raise UserError(
            f"{folder / 'config.json'} describes no network ({_reason(error)}); download it again"
        ) from error


def _refuse_code_from_elsewhere(kind: Any, folder: Path, config: dict[str, Any]) -> None:
    """Raise UserError for what makes transformers load more than the folder's weights: an adapter, or kernels of the hub."""
    if not kind.__module__.startswith("transformers"):
        return
    if (folder / _ADAPTER).exists():
        raise UserError(
            f"{folder} has an adapter beside its weights ({_ADAPTER}), which may name another base; merge it into the weights "
            "with PEFT, or remove it"
        )
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for name, value in ((name, value) for part in parts for name, value in part.items()):
        if "attn_implementation" in name and isinstance(value, str) and "/" in value:
            raise UserError(
                f"{folder / 'config.json'} has {name[:60]}={value[:60]!r}, code of the hub, which is not run here; remove the entry"
            )


@lru_cache(maxsize=64)
def _defaults(kind: Any) -> dict[str, Any]:
    """The defaults of a class's settings."""
    if kind.__module__.startswith("transformers"):
        return dict(kind.config_class().to_dict())
    return signature_defaults(kind)


def signature_defaults(kind: Any) -> dict[str, Any]:
    """The defaults of a class's arguments; a whole number that stands for any number is a float."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    any_number = (float, "float")
    return {
        part.name: float(part.default) if part.annotation in any_number and part.default is not None else part.default
        for part in parameters if part.default is not part.empty
    }  # fmt: skip


def published_names(weights: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """A CLIPTextModel's tensors under `text_model.`, as published files have them; other networks' as they are.

    transformers 5 saves them without the prefix. It reads both; transformers 4 would leave such an encoder at random
    values with a warning.
    """
    if architecture != "CLIPTextModel" or any(name.startswith(_CLIP) for name in weights):
        return dict(weights)
    return {f"{_CLIP}{name}": value for name, value in weights.items()}


def _load_short_names(module: Any, folder: Path, missing: list[str]) -> bool:
    """Under transformers 4, a CLIPTextModel that transformers 5 has saved; whether it was one."""
    if type(module).__name__ != "CLIPTextModel" or not (folder / _WEIGHTS).is_file():
        return False
    weights = published_names(load_file(folder / _WEIGHTS), "CLIPTextModel")
    if not weights.keys() >= set(missing):
        return False
    module.load_state_dict(weights, strict=False)
    return True


def _reason(error: BaseException) -> str:
    """First line of what safetensors said, where it is behind the error; without diffusers' advice to programmers."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, SafetensorError):
        cause = cause.__cause__ or cause.__context__
    line = first_line(cause or error).split(". If you want to instead")[0]
    return " ".join(line.split()).rstrip(".")
