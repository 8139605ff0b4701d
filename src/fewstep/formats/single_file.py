"""A whole Stable Diffusion 1.x or SDXL model in one file, with LDM keys: read without executing anything in it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.ldm_keys import PREFIXES, from_ldm
from fewstep.formats.tensor_files import first_line, read_safetensors
from fewstep.formats.torch_archive import read_torch_archive

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# Older merges leave this out of CLIP's keys
_OPTIONAL_PREFIX = "text_model."
# Models that come in single files too, but not in these two layouts: where they are known by
_OTHERS = {
    "cond_stage_model.model.": "Stable Diffusion 2.x",
    "conditioner.embedders.0.model.": "the SDXL refiner",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "lora_unet_": "a LoRA",
    "control_model.": "a ControlNet",
    "down_blocks.": "a U-Net in diffusers' own keys",
}


@dataclass(frozen=True)
class SingleFile:
    """The components of a single-file checkpoint.

    Attributes:
        path: the file.
        family: "sd" or "sdxl".
        parts: component -> its tensors by their LDM keys without the component's prefix.
        metadata: the file's header entries.
    """

    path: Path
    family: str
    parts: dict[str, dict[str, Tensor]]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def prediction_type(self) -> str:
        """ "epsilon" or "v_prediction" where the header says so, else ""."""
        stated = self.metadata.get("modelspec.prediction_type", "")
        return {"epsilon": "epsilon", "v": "v_prediction"}.get(stated, "")

    def diffusers_state(
        self, component: str, config: Mapping[str, Any], shapes: Mapping[str, torch.Size]
    ) -> dict[str, Tensor]:
        """One component's state dict in diffusers' names, float16, bfloat16 or float32.

        Args:
            component: one of `parts`.
            config: the component's config.
            shapes: names and shapes of the network with this config.

        Raises:
            UserError: the file holds another network, or numbers that are none; names the tensor.
        """
        try:
            state = from_ldm(component, self.parts[component], config, shapes)
            return {name: _weight(name, value) for name, value in state.items()}
        except (UserError, RuntimeError) as error:
            raise UserError(f"{self.path}: {error}") from error


def read_single_file(path: Path) -> SingleFile:
    """The components of a single-file checkpoint, its tensors still under their LDM keys.

    Args:
        path: a .safetensors; or a .ckpt whose pickle holds nothing but tensors.

    Raises:
        UserError: no such file, a damaged one, a pickle with anything but tensors, or another kind of model.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file; give a single-file checkpoint (.safetensors)")
    tensors, metadata = _read_pickle(path) if path.suffix.lower() in _PICKLES else read_safetensors(path)
    family = _family(tensors, path)
    prefixes = PREFIXES[family]
    parts: dict[str, dict[str, Tensor]] = {component: {} for component in prefixes}
    for key, value in tensors.items():
        for component, prefix in prefixes.items():
            if key.startswith(stem := prefix.removesuffix(_OPTIONAL_PREFIX)):
                short = key.removeprefix(stem)
                optional = _OPTIONAL_PREFIX if prefix != stem else ""
                parts[component][short.removeprefix(optional)] = value
    if absent := [component for component, part in parts.items() if not part]:
        raise UserError(f"{path} is no whole model: it has no tensors of {', '.join(absent)}")
    return SingleFile(path, family, parts, metadata)


def _family(keys: Iterable[str], path: Path) -> str:
    keys = list(keys)
    if any(key.startswith(PREFIXES["sdxl"]["text_encoder_2"]) for key in keys):
        return "sdxl"
    for prefix, name in _OTHERS.items():
        if any(key.startswith(prefix) for key in keys):
            raise UserError(f"{path} is {name}; single files of Stable Diffusion 1.x and SDXL are read")
    if any(key.startswith(PREFIXES["sd"]["unet"]) for key in keys):
        return "sd"
    shown = sorted(keys)[:3]
    raise UserError(
        f"{path} is no Stable Diffusion 1.x or SDXL checkpoint: it has {len(keys)} tensors, e.g. {shown}, "
        f"and none that begins with {PREFIXES['sd']['unet']}"
    )


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a pickle that holds nothing else, as a state dict or under `state_dict`."""
    try:
        return read_torch_archive(path), {}
    except UserError as error:
        raise UserError(
            f"{path} is a pickle with more than tensors in it, or a damaged one; convert it to .safetensors "
            f"({first_line(error)})"
        ) from error


def _weight(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        raise UserError(f"its tensor {name} holds {value.dtype}, no weights")
    kept = value if value.dtype in (torch.float16, torch.bfloat16, torch.float32) else value.float()
    if not bool(torch.isfinite(kept).all()):
        raise UserError(f"its tensor {name} has numbers that are infinite or none; this is no usable model")
    return kept.contiguous()
