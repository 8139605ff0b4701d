"""The ways published LoRAs spell a layer and its two matrices, to (layer, "down", "up" or "alpha").

diffusers' own converters know its older spellings and are used for them (`convert_unet_state_dict_to_peft`,
`convert_state_dict_to_peft`). kohya's underscores are looked up among the network's layers instead.

Differs: diffusers' `_maybe_map_sgm_blocks_to_diffusers` and `_convert_non_diffusers_lora_to_diffusers` are private, replace parts
of names, each version other ones, leave out embeddings and the first and last convolution, and carry alpha apart from the
matrices. Where both read a file (every block layer of SDXL) a test holds the two results equal.
"""

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from fewstep.formats.wrapped_names import bare_name

KOHYA = "lora_unet_"
NETWORK = "network."  # where a Denoiser keeps its diffusers network
# from the names of a network's modules to {another name of a layer: its name, or those it stands for, row after row}
LayerAliases = Callable[[Iterable[str]], Mapping[str, str | tuple[str, ...]]]
_PARTS = {
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha",
}  # fmt: skip
_PREFIXES = ("base_model.model.", "unet.", "transformer.", "model.diffusion_model.", "diffusion_model.")
# of PEFT's own state dict: lora_A.default.weight
_ADAPTER_NAME = re.compile(r"\.lora_([AB])\.(?!weight$|bias$)\w+\.weight$")
_LORA_KEY = re.compile(r"(^|[._])lora([._]|$)")


def no_aliases(modules: Iterable[str]) -> Mapping[str, str | tuple[str, ...]]:
    """Of networks whose layers have one name each."""
    return {}


def is_lora_key(name: str) -> bool:
    """Whether a tensor of this name belongs to a LoRA, in any spelling."""
    return _LORA_KEY.search(name) is not None or name.startswith("lora_")


def is_kohya(keys: Iterable[str]) -> bool:
    """Whether the layers' names are written with underscores."""
    return any(key.startswith("lora_") for key in keys)


def is_mixed(keys: Iterable[str]) -> bool:
    """Whether some layers' names are written with underscores and some with dots."""
    return len({key.startswith("lora_") for key in keys}) > 1


def modern_spelling(tensors: Mapping[str, Tensor]) -> dict[str, list[tuple[str, Tensor]]]:
    """{key as PEFT spells it: [(the key of the file, its tensor)]}; two entries where the file has one matrix twice."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    renamed: dict[str, list[tuple[str, Tensor]]] = {}
    for key, value in tensors.items():
        (name,) = convert_unet_state_dict_to_peft({key: value})
        if "lora_linear_layer" in name:
            (name,) = convert_state_dict_to_peft({name: value})
        name = bare_name(_ADAPTER_NAME.sub(r".lora_\1.weight", name), _PREFIXES)
        renamed.setdefault(name, []).append((key, value))
    return renamed


def dotted_part(name: str) -> tuple[str, str] | None:
    """(layer, part) of a key with dots; None where it is no plain LoRA's."""
    return next(((name.removesuffix(end), part) for end, part in _PARTS.items() if name.endswith(end)), None)


def kohya_part(key: str) -> tuple[str, str] | None:
    """(layer with underscores, part) of one of kohya's keys; None where it is no plain LoRA's."""
    layer, _, part = key.partition(".")
    known = layer.startswith(KOHYA) and f".{part}" in _PARTS and not part.startswith(("lora_A", "lora_B"))
    return (layer.removeprefix(KOHYA), _PARTS[f".{part}"]) if known else None


def layer_table(modules: Iterable[str], aliases: LayerAliases, separator: str) -> dict[str, list[tuple[str, ...]]]:
    """{a layer's name, in diffusers' and in its family's other words: what it can mean, each one module or several in one}.

    Args:
        modules: names of the network's modules.
        aliases: the family's other words.
        separator: what stands between the words: "_" for kohya's keys, "." otherwise.
    """
    full = {name.removeprefix(NETWORK): name for name in modules}
    table: dict[str, list[tuple[str, ...]]] = {}
    for words, names in [*((name, name) for name in full), *aliases(full).items()]:
        means = table.setdefault(words.replace(".", separator), [])
        found = tuple(full[name] for name in ((names,) if isinstance(names, str) else names))
        if found not in means or separator == "_":
            means.append(found)
    return table
