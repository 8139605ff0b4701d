"""Every model family by name: the one place a new family is entered."""

import importlib
from typing import Any

from fewstep.diffusion.denoiser import Denoiser

# family -> (module below families, class)
FAMILIES = {
    "edm": ("edm.denoiser", "EDMDenoiser"),
    "diffusers-unet": ("stable_diffusion.denoiser", "DiffusersUNetDenoiser"),
    "sd3": ("sd3.denoiser", "SD3Denoiser"),
}


def build_denoiser(description: dict[str, Any]) -> Denoiser:
    """An untrained model from its JSON description (`family` and what that family needs).

    Raises:
        ValueError: the family is unknown or its description is wrong.
    """
    family = description.get("family")
    if family not in FAMILIES:
        raise ValueError(f"model family {family!r} is unknown; this version knows {sorted(FAMILIES)}")
    module, name = FAMILIES[family]
    kind = getattr(
        importlib.import_module(f"fewstep.families.{module}"), name
    )  # diffusers is imported only when needed
    built: Denoiser = kind.from_description(description)
    return built
