"""What a LoRA's files say about its scale, as PEFT reads it: alpha, per-layer patterns, rank-stabilised scaling.

PEFT scales layer l by alpha_l / rank_l, or alpha_l / sqrt(rank_l) with `use_rslora`; alpha_l is that of the first pattern
that the layer's name ends with. Whatever else its config can change about the arithmetic is refused by name.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fewstep.errors import UserError, first_line
from fewstep.formats.json_files import read_json_object

CONFIG = "adapter_config.json"
_REMEDY = "save the LoRA again with PEFT"
_COMPONENTS = ("unet.", "transformer.")
# Entries of PEFT's config that are honoured here, or change nothing about what a finished LoRA computes
_UNDERSTOOD = frozenset(
    {
        "r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "init_lora_weights", "peft_type", "peft_version",
        "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "target_modules",
        "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "eva_config", "megatron_core",
        "qalora_group_size", "runtime_config",
    }
)  # fmt: skip
# Ways to start training that change the base's own weights: the saved matrices alone do not give the trained network
_CHANGES_THE_BASE = re.compile(r"(pissa|olora|loftq|corda|lora_ga|lora-ga)", re.IGNORECASE)
_PLAIN_PATTERN = re.compile(r"\^?(\.\*)?[\w.\\]+\$?")  # a stranger's expression may take for ever


@dataclass(frozen=True)
class LoraScale:
    """Scale facts of one LoRA.

    Attributes:
        alpha: of every layer that no pattern names; None: the layer's rank.
        patterns: alpha by the end of a layer's name, first match first.
        stabilised: divide by the root of the rank.
        rank: that the config gives every layer which no pattern names; None: it does not say.
        ranks: as `patterns`, of the rank.
    """

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    stabilised: bool = False
    rank: float | None = None
    ranks: Mapping[str, float] = field(default_factory=dict)

    def alpha_of(self, layer: str, rank: int) -> float:
        """The alpha under which alpha / rank is the layer's scale.

        Args:
            layer: its name in the network, without the network's own.

        Raises:
            ValueError: the config says another rank, so that it is not this file's.
        """
        said = _named(layer, self.ranks, self.rank)
        if said not in (None, rank):
            raise ValueError(f"{layer} has rank {rank}, {CONFIG} or the header says {said:g}")
        alpha = _named(layer, self.patterns, self.alpha)
        alpha = float(rank) if alpha is None else alpha
        return alpha * math.sqrt(rank) if self.stabilised else alpha


def _named(layer: str, patterns: Mapping[str, float], otherwise: float | None) -> float | None:
    """The value of the first pattern that a layer's name ends in."""
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    return next(found, otherwise)


def read_lora_scale(path: Path, header: Mapping[str, str], kohya: bool = False) -> LoraScale:
    """From our own header, from diffusers', or from PEFT's config beside the file.

    Args:
        kohya: the file is in kohya's keys, whose scale is in the file: a config beside it is another's.

    Raises:
        UserError: damaged, or something that changes a LoRA's arithmetic and is not known here; names it.
    """
    if "lora" in header:
        return _scale({"lora_alpha": _object(path, header["lora"]).get("alpha")}, path)
    if kohya:
        return LoraScale()
    if "lora_adapter_metadata" in header:
        return _scale(_of_network(_object(path, header["lora_adapter_metadata"])), path)
    config = path.parent / CONFIG
    return _scale(read_json_object(config, _REMEDY), config) if config.is_file() else LoraScale()


def _of_network(values: Mapping[str, Any]) -> dict[str, Any]:
    """What diffusers' header says of the network: with its name before each entry from a pipeline, without from a network."""
    named = {name.split(".", 1)[1]: value for name, value in values.items() if name.startswith(_COMPONENTS)}
    return named or {name: value for name, value in values.items() if "." not in name}


def _object(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: what it says about alpha is damaged ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: what it says about alpha is damaged (not an object)")
    return found


def _scale(config: Mapping[str, Any], path: Path) -> LoraScale:
    _refuse_unknown(config, path)
    rank = None if config.get("r") is None else _number(config["r"], path, "rank")
    alpha = None if config.get("lora_alpha") is None else _number(config["lora_alpha"], path, "alpha")
    alphas, ranks = _patterns(config, path, "alpha"), _patterns(config, path, "rank")
    for pattern in alphas:
        if not _PLAIN_PATTERN.fullmatch(pattern):
            raise UserError(
                f"{path}: alpha_pattern {pattern[:100]!r} is more than the end of a layer's name; name the layers in full"
            )
    stabilised = config.get("use_rslora") or False
    if not isinstance(stabilised, bool):
        raise UserError(
            f"{path}: what it says about use_rslora is damaged (it is {str(stabilised)[:40]!r}, not true or false)".replace(
                "\n", " "
            )
        )
    if not all(_PLAIN_PATTERN.fullmatch(pattern) for pattern in ranks):  # the tensors have their ranks all the same
        return LoraScale(alpha, alphas, stabilised)
    return LoraScale(alpha, alphas, stabilised, rank, ranks)


def _patterns(config: Mapping[str, Any], path: Path, what: str) -> dict[str, float]:
    """{end of a layer's name: its alpha or rank}."""
    patterns = config.get(f"{what}_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{path}: what it says about {what} is damaged ({what}_pattern is not an object)")
    return {name: _number(value, path, what) for name, value in patterns.items()}


def _number(value: object, path: Path, what: str) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    except OverflowError:
        pass
    raise UserError(
        f"{path}: what it says about {what} is damaged (it is {str(value)[:40]!r}, not a number)".replace("\n", " ")
    )


def _refuse_unknown(config: Mapping[str, Any], path: Path) -> None:
    """Raise UserError for entries that are not understood and not at PEFT's default."""
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{path}: an adapter of PEFT's kind {str(config['peft_type'])[:40]!r}; plain LoRAs are read")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and _CHANGES_THE_BASE.search(start):
        raise UserError(
            f"{path}: init_lora_weights={start[:40]!r} changed the base's own weights; convert it to a plain LoRA with "
            "PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    defaults = _peft_defaults()
    for name, value in config.items():
        default = defaults.get(name)
        plain = value == default or (not value and not default)
        if name not in _UNDERSTOOD and not plain:
            raise UserError(
                f"{path}: {name[:60]}={json.dumps(value)[:60]} changes what the LoRA computes in a way that is not known "
                "here; merge it into its base with PEFT and convert the network"
            )


@cache
def _peft_defaults() -> dict[str, Any]:
    from peft import LoraConfig

    return LoraConfig().to_dict()
