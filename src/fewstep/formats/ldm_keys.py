"""Keys of the LDM layout, where scripts of others import them from; the layouts themselves are the families'.

Nothing of ours imports this module. It lies below the families, so their registry is looked up when it is called.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor

from fewstep.errors import UserError


def to_ldm(family: str, component: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """One component's tensors under the keys of the family's single files.

    Args:
        family: "sd" or "sdxl".
        component: "unet", "vae", "text_encoder", ...
        state: by diffusers' names.
        config: the component's config.

    Raises:
        UserError: no such family or component, or another network than the layout has.
    """
    layouts = {layout.family: layout for layout in import_module("fewstep.families.registry").single_file_layouts()}
    if family not in layouts or component not in layouts[family].prefixes:
        raise UserError(f"single files have no {component} of {family}; there are {', '.join(layouts)}")
    found: dict[str, Tensor] = layouts[family].to_file(component, state, config)
    return found
