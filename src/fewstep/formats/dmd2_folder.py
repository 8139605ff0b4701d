"""Reads DMD2's checkpoints: folders `..._checkpoint_model_NNNNNN/` and released single `.bin` files.

A folder has `pytorch_model.bin`, the generator's state dict under EDM's or diffusers' keys, and
`pytorch_model_1.bin` with `fake_unet.*`, `cls_pred_branch.*` and sometimes `real_unet.*`. Newer versions of the saving
library write the same as safetensors. A released file is the generator alone. Source: METHOD.md section 6.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.foreign_kinds import foreign_kind
from fewstep.formats.model_folder import CARD
from fewstep.formats.tensor_files import read_tensors, refuse_infinities
from fewstep.formats.wrapped_names import bare_name, networks_in, prefix_of_one_network

Layout = Literal["edm", "diffusers"]  # whose keys

_COMPONENT_FILES = (
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bf16.safetensors",
    "diffusion_pytorch_model.bin",
)  # fmt: skip
_GENERATOR_FILES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin", *_COMPONENT_FILES)
_GUIDANCE_FILES = ("model_1.safetensors", "pytorch_model_1.safetensors", "pytorch_model_1.bin")
_FAKE, _HEAD, _REAL = "fake_unet.", "cls_pred_branch.", "real_unet."
_FIRST = {"map_layer0.weight": "edm", "conv_in.weight": "diffusers"}  # tensors by which a network's prefix is known

# Constants that training scripts keep as buffers beside the networks, and frozen models they carry along.
_CONSTANTS = frozenset(
    {
        "karras_sigmas", "sigmas", "log_sigmas", "sigma_min", "sigma_max", "sigma_data", "alphas_cumprod", "alphas",
        "betas", "timesteps", "add_time_ids", "uncond_embedding", "uncond_embeds",
    }
)  # fmt: skip
_FROZEN = (_REAL, "vae.", "text_encoder.", "text_encoder_one.", "text_encoder_two.", "text_encoder_2.")


@dataclass(frozen=True)
class DMD2Checkpoint:
    """What one checkpoint holds.

    Attributes:
        layout: whose keys the networks have.
        generator: state dict; EDM's keys with their prefix `model.`, diffusers' keys as a U-Net has them.
        fake_score: the same for the fake score; empty where the checkpoint has none.
        discriminator: keys below `cls_pred_branch.`; empty where the checkpoint has none.
    """

    layout: Layout
    generator: dict[str, Tensor]
    fake_score: dict[str, Tensor] = field(default_factory=dict)
    discriminator: dict[str, Tensor] = field(default_factory=dict)


def is_dmd2_checkpoint(path: Path) -> bool:
    """Whether a path looks like one: a folder with such files, or a weights file by its name."""
    if path.is_file():
        return path.suffix.lower() in (".bin", ".pt", ".pth", ".safetensors")
    return not (path / CARD).is_file() and _find(path, _GENERATOR_FILES) is not None


def read_dmd2(path: str | Path) -> DMD2Checkpoint:
    """Read a checkpoint folder or a single generator file, without unpickling; the teacher's copy is not read.

    Raises:
        UserError: no weights there, a damaged or hostile file, tensors of another kind of model (named), or
            infinities among the weights (named).
    """
    path = Path(path).expanduser()
    if path.is_file():
        layout, generator = _read_generator(path)
        return DMD2Checkpoint(layout, generator)
    file = _find(path, _GENERATOR_FILES)
    if file is None:
        raise UserError(_no_weights(path))
    layout, generator = _read_generator(file)
    guidance = _find(path, _GUIDANCE_FILES)
    if guidance is None:
        return DMD2Checkpoint(layout, generator)
    fake_score, discriminator = _read_guidance(guidance, layout)
    return DMD2Checkpoint(layout, generator, fake_score, discriminator)


def fit_discriminator(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """A head's tensors under our names: layers that have weights are matched by order, then by their shapes.

    Args:
        tensors: keys such as `0.weight` or `2.0.bias`; activations and dropout between them may shift the numbers.
        expected: state dict of our head.
        where: what messages call the source.

    Raises:
        UserError: another number of layers, or a layer of another shape; names it.
    """
    theirs, ours = _by_layer(tensors, where), _by_layer(expected, where)
    if len(theirs) != len(ours):
        raise UserError(
            f"{where}: its discriminator has {len(theirs)} layers with weights ({', '.join(theirs)}), the one for this "
            f"network has {len(ours)}"
        )
    found: dict[str, Tensor] = {}
    for (name, parts), (own_name, own_parts) in zip(theirs.items(), ours.items(), strict=True):
        shapes, own_shapes = (
            {leaf: tuple(value.shape) for leaf, value in sorted(group.items())} for group in (parts, own_parts)
        )
        if shapes != own_shapes:
            raise UserError(
                f"{where}: layer {_HEAD}{name} of its discriminator has {shapes}, this network's needs {own_shapes}"
            )
        found |= {f"{own_name}.{leaf}": parts[leaf] for leaf in own_parts}
    return found


def _read_generator(path: Path) -> tuple[Layout, dict[str, Tensor]]:
    tensors = _unwrapped(read_tensors(path))
    for first in _FIRST:
        if prefix := prefix_of_one_network((name for name in tensors if name not in _CONSTANTS), first):
            tensors = _renamed(tensors, lambda name, prefix=prefix: name.removeprefix(prefix))  # type: ignore[misc]
    layout = _layout(tensors, path)
    generator = _network(tensors, layout)
    refuse_infinities(generator, str(path))
    return layout, generator


def _read_guidance(path: Path, layout: Layout) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(fake score, discriminator) of the second file."""
    tensors = _unwrapped(read_tensors(path, lambda name: not bare_name(name).startswith(_FROZEN)))
    fake, head = _below(tensors, _FAKE), _below(tensors, _HEAD)
    strange = [name for name in tensors if not name.startswith((_FAKE, _HEAD)) and name not in _CONSTANTS]
    if strange or not fake:
        raise UserError(
            f"{path} is not the second file of a DMD2 checkpoint: it should hold {_FAKE}* and {_HEAD}*, "
            f"and holds {(strange or sorted(tensors))[:3]}"
        )
    fake = _unwrapped(fake)
    if _layout(fake, path) != layout:
        raise UserError(f"{path}: its fake score is another kind of network than the generator beside it")
    refuse_infinities(tensors, str(path))
    return _network(fake, layout), head


def _network(tensors: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The network alone, under the keys our own networks have."""
    if layout == "diffusers":
        return {name: value for name, value in tensors.items() if name not in _CONSTANTS}
    bare = _renamed(tensors, lambda name: name.removeprefix("model."))
    return {f"model.{name}": value for name, value in bare.items() if name not in _CONSTANTS}


def _layout(tensors: Mapping[str, Tensor], path: Path) -> Layout:
    if {"map_layer0.weight", "model.map_layer0.weight"} & set(tensors):
        return "edm"
    if "conv_in.weight" in tensors and any(name.startswith("down_blocks.") for name in tensors):
        return "diffusers"
    if len(several := networks_in(tensors, "conv_in.weight")) > 1 and not foreign_kind(tensors):
        shown = ", ".join(f"{name[:60]}*" for name in several[:3])
        raise UserError(f"{path} holds several networks ({shown}): save the one that you mean in a file of its own")
    kind = foreign_kind(tensors)
    raise UserError(
        f"{path} {f'is {kind} by its keys: it ' if kind else ''}holds neither an EDM network (map_layer0.weight, enc.*, dec.*) nor a diffusers U-Net "
        f"(conv_in.weight, down_blocks.*): its keys are {list(tensors)[:3]} and {max(0, len(tensors) - 3)} more"
    )


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _renamed(tensors, bare_name)


def _renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    renamed = {rename(name): value for name, value in tensors.items()}
    if len(renamed) != len(tensors):
        raise UserError("two tensors of the checkpoint have one name, with and without its prefix")
    return renamed


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _by_layer(tensors: Mapping[str, Tensor], where: str) -> dict[str, dict[str, Tensor]]:
    """{layer number(s): {weight, bias}}, in the order of the numbers."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if not all(part.isdecimal() for part in layer.split(".")):
            raise UserError(f"{where}: {_HEAD}{name} is no layer of a sequential discriminator")
        layers.setdefault(layer, {})[leaf] = value
    return dict(sorted(layers.items(), key=lambda item: [int(part) for part in item[0].split(".")]))


def _find(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _no_weights(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist; give a DMD2 checkpoint folder or a weights file"
    inside = sorted(child.name for child in path.iterdir() if _find(child, _GENERATOR_FILES))
    if inside:
        return f"{path} holds {len(inside)} checkpoint folders; give one of them, e.g. {path / inside[-1]}"
    if parts := sorted(path.glob("*-of-*.safetensors")):
        return (
            f"{path} holds its weights in {len(parts)} parts; convert reads them from one file: save the network as one"
        )
    return f"{path} is a folder without weights: no pytorch_model.bin, no {_GENERATOR_FILES[0]} and no {_COMPONENT_FILES[0]} is in it"
