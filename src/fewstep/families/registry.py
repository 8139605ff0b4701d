"""Every family by name: the one place where a new family is entered."""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.diffusion.denoiser import Denoiser
    from fewstep.families.family import Family, NewNetwork
    from fewstep.formats.single_file import SingleFileLayout

# name -> "module below families: class"; imported when first asked for
FAMILIES = {
    "edm": "edm.family:EDMFamily",
    "sd": "stable_diffusion.family:StableDiffusion",
    "sdxl": "stable_diffusion.family:StableDiffusionXL",
    "sd3": "sd3.family:StableDiffusion3",
    "z-image": "z_image.family:ZImage",
    "flux2-klein": "flux2_klein.family:Flux2Klein",
    "qwen-image": "qwen_image.family:QwenImage",
}


LARGEST = 32  # pixels of pictures whose size nobody chose: a network of larger ones wants a GPU and a choice


@cache
def family_named(name: str) -> "Family":
    """The family of this name.

    Raises:
        ValueError: none has it.
    """
    if name not in FAMILIES:
        raise ValueError(f"model family {name!r} is unknown; this version knows {sorted(FAMILIES)}")
    module, kind = FAMILIES[name].split(":")
    family: Family = getattr(import_module(f"fewstep.families.{module}"), kind)()
    return family


def all_families() -> "list[Family]":
    """Every family, in the order of the table."""
    return [family_named(name) for name in FAMILIES]


def family_of(description: dict[str, Any]) -> "Family":
    """The family of a network's description (see `Denoiser.describe`).

    Raises:
        ValueError: none knows it.
    """
    for family in all_families():
        if family.describes(description):
            return family
    raise ValueError(f"model family {description.get('family')!r} is unknown; this version knows {sorted(FAMILIES)}")


def recognise(folder: Path) -> "Family":
    """The family of the model in a folder or file.

    Raises:
        UserError: none of this version, or its configs are missing or damaged.
    """
    for family in all_families():
        if family.recognise(folder):
            return family
    _refuse_unknown(folder)
    raise AssertionError("a model that is not recognised is refused")


def _refuse_unknown(folder: Path) -> None:
    """Raise UserError that says why the model in a folder or file is of no family."""
    from fewstep.families.diffusers_folder import is_diffusers_folder, refuse_unknown_network
    from fewstep.formats.diffusers_index import INDEX, read_model_index
    from fewstep.formats.model_folder import CARD, read_card

    if folder.is_file():
        raise UserError(
            f"{folder} is neither a model folder nor an EDM .pkl; `fewstep convert` makes folders of single files, LoRAs and other "
            "tools' weights"
        )
    loose = [path.name for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".bin", ".ckpt", ".pkl")]
    if loose and not any((folder / name).exists() for name in (INDEX, CARD)):
        raise UserError(
            f"{folder} is no model folder but has weights for other tools, {loose[0]}: `fewstep convert` makes a folder of them; what "
            "`fewstep export` wrote computes as the run, or the generator's folder, that it came from: give that"
        )
    if is_diffusers_folder(folder):
        refuse_unknown_network(folder, all_families())
    if (folder / INDEX).is_file() and not (folder / CARD).is_file():
        parts = sorted(read_model_index(folder))
        raise UserError(
            f"{folder} is a diffusers model that makes no pictures from text alone: its {INDEX} names {', '.join(parts)[:200] or 'nothing'}, "
            "and no text encoder"
        )
    description, _ = read_card(folder)  # says which of our files is missing or damaged
    raise UserError(
        f"{folder}: model family {description.get('family')!r} is unknown; this version knows {sorted(FAMILIES)}"
    )


def component_of(description: dict[str, Any]) -> str:
    """What diffusers calls the network of a description; raises ValueError where no family knows it."""
    return family_of(description).component


def describe_weights(weights: "Mapping[str, Tensor]") -> dict[str, Any]:
    """The description of the network that a state dict alone belongs to; raises ValueError where none follows."""
    for family in all_families():
        if (description := family.describe_weights(weights)) is not None:
            return description
    raise ValueError("its tensors alone do not say which network they are")


def describe_new(name: str, pictures: "NewNetwork") -> dict[str, Any]:
    """The description of a network to be trained from nothing, by its shape's name.

    Raises:
        ValueError: no family has this shape.
    """
    names: list[str] = []
    for family in all_families():
        if name in family.new_shapes:
            return family.describe_new(name, pictures)
        names += family.new_shapes
    raise ValueError(f"network.name={name!r} is unknown; choose one of {', '.join(sorted(names))}")


def largest_side(name: str, shortest_side: int, channels: int, classes: int, sigma_data: float = 0.5) -> int:
    """The largest side up to `LARGEST` that no picture is enlarged for and a new network of this name can have; 0 for none.

    Raises:
        ValueError: no network of this name makes such pictures at any size.
    """
    from fewstep.families.family import NewNetwork

    for side in range(min(LARGEST, shortest_side), 7, -1):
        try:
            describe_new(name, NewNetwork(side, channels, classes, sigma_data))
        except ValueError as error:
            if "multiple" not in str(error):
                raise
            continue
        return side
    return 0


def file_words() -> set[str]:
    """What the names of published files call the models, of every family."""
    return {word for family in all_families() for word in family.file_words}


def single_file_layouts() -> "list[SingleFileLayout]":
    """How whole models lie in one file, of every family that has such files."""
    return [family.single_file for family in all_families() if family.single_file is not None]


def unread_files() -> dict[str, str]:
    """Beginnings of keys of single files that are not read, of every family: what messages call them."""
    return {prefix: name for family in all_families() for prefix, name in family.unread_files.items()}


def build_denoiser(description: dict[str, Any]) -> "Denoiser":
    """An untrained model from its JSON description, on torch's current default device.

    Raises:
        ValueError: the family is unknown or its description is wrong.
        UserError: a library that the family needs is not installed.
    """
    return family_of(description).build(description)


def build_on_meta(description: dict[str, Any]) -> "Denoiser":
    """As `build_denoiser`, on the meta device: shapes without memory, and refused where it has parts without end."""
    from fewstep.networks.untrained import build_untrained

    return build_untrained(lambda: build_denoiser(description))


def released_shapes() -> dict[str, dict[str, Any]]:
    """The description of every released network by its name, as `teacher.network` has it."""
    return {name: dict(shape) for family in all_families() for name, shape in family.shapes.items()}


def build_released(name: str, resolution: int = 0) -> "Denoiser":
    """The untrained network of a released model, on the meta device: shapes without memory.

    Args:
        name: one of `released_shapes`.
        resolution: side of the pictures in pixels, of models that work on latents; 0 takes the model's own.

    Raises:
        ValueError: the name is unknown, or no latent has this resolution.
        UserError: a library that the family needs is not installed.
    """
    for family in all_families():
        if name in family.shapes:
            return build_on_meta(family.describe_released(name, resolution))
    raise ValueError(f"teacher.network={name!r} is not a released network; choose one of {sorted(released_shapes())}")
