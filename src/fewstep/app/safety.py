"""The safety checker that some model folders carry, on finished pictures."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from fewstep.errors import UserError, first_line

CHECKER, PROCESSOR = "safety_checker", "feature_extractor/preprocessor_config.json"


class SafetyChecker:
    """Says which pictures to withhold.

    Args:
        network: says of CLIP's view of a picture whether it is to be withheld.
        processor: a CLIP image processor, which fits pictures to the network.
    """

    def __init__(self, network: Any, processor: Any) -> None:
        self.network, self.processor = network.float().eval(), processor

    @torch.no_grad()
    def flagged(self, pictures: list[Image.Image]) -> list[bool]:
        """Whether each RGB picture is to be withheld."""
        if not pictures:
            return []
        pixels = self.processor(pictures, return_tensors="pt").pixel_values
        unused = [torch.zeros(1) for _ in pictures]  # what it would blacken; that is done by who asks
        _, flags = self.network(clip_input=pixels.to(self.network.device), images=unused)
        return [bool(flag) for flag in flags]


def has_safety_checker(folder: Path) -> bool:
    """Whether a model folder has a checker's weights, in any file format."""
    place = folder / CHECKER
    return any(place.glob("*.safetensors")) or any(place.glob("*.bin"))


def load_safety_checker(kind: str, folder: Path, device: torch.device) -> SafetyChecker | None:
    """The checker of a diffusers folder (`safety_checker/`, `feature_extractor/`), None where it has none.

    Args:
        kind: "module:class" of the network, as the family says it; empty: none is known.

    Raises:
        UserError: it is damaged or incomplete. A page that was meant to be checked does not start unchecked.
    """
    if not has_safety_checker(folder):
        return None
    if not kind:
        raise UserError(
            f"{folder} has a safety checker, of a kind that is not known for its family; start without with --no-safety-checker"
        )
    advice = "repair it, or start without with --no-safety-checker"
    if not (folder / CHECKER / "model.safetensors").is_file():
        raise UserError(f"{folder / CHECKER} has no model.safetensors (other formats are not read); {advice}")
    if not (folder / PROCESSOR).is_file():
        raise UserError(f"{folder} has a safety checker, but no {PROCESSOR}, which it needs; {advice}")
    from fewstep.networks.components import quiet_loading
    from fewstep.networks.image_processors import processor_class

    module, _, name = kind.partition(":")
    checker: Any = getattr(import_module(module), name)
    options: dict[str, Any] = {"local_files_only": True}
    try:
        with quiet_loading():
            loaded: Any = checker.from_pretrained(
                folder / CHECKER, use_safetensors=True, output_loading_info=True, **options
            )
            network, report = loaded
            processor = processor_class("CLIPImageProcessor").from_pretrained((folder / PROCESSOR).parent, **options)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder / CHECKER} cannot be loaded ({first_line(error)}); {advice}") from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise UserError(
            f"{folder / CHECKER} is damaged: {len(missing)} tensors are missing, e.g. {missing[0]}; {advice}"
        )
    return SafetyChecker(network.to(device), processor)
