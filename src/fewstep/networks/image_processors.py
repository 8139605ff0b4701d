"""How pictures are fitted to a network of transformers: the preprocessor_config.json in its folder, by classes known here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from fewstep.errors import UserError, first_line
from fewstep.formats.json_files import read_json_object
from fewstep.networks.components import quiet_loading

FILE = "preprocessor_config.json"


class ImageProcessor:
    """Pictures to a network's input, as its own processor says: resized, cropped, scaled, normalised; on the CPU, by PIL.

    Args:
        processor: of transformers.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, pictures: list[Image.Image]) -> Tensor:
        """B pictures -> (B, 3, H, W), float32."""
        pixels: Tensor = self._processor([one.convert("RGB") for one in pictures], return_tensors="pt").pixel_values
        return pixels.float()


def processor_class(kind: str) -> Any:
    """A class of transformers without torchvision: since version 5 it has a name of its own, before it was the only one."""
    return getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)


def load_image_processor(folder: Path, kinds: Mapping[str, str], side: int) -> ImageProcessor:
    """The image processor in a network's folder.

    Nothing of the folder chooses a class: `kinds` names those there may be.

    Args:
        kinds: what the config may name (without "Fast") -> the class of transformers that is meant.
        side: pixels that the network takes a side; 0: any.

    Raises:
        UserError: no config, one of another processor, or one whose pictures the network does not take; names it.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {FILE}, which says how pictures are fitted to it; download it again, whole")
    config = read_json_object(path)
    named = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
    kind = kinds.get(named.removesuffix("Fast"))
    if kind is None:
        raise UserError(f"{path} names {named[:60]}, not one of {', '.join(kinds)}; give the model's own file")
    try:
        with quiet_loading():
            processor = ImageProcessor(processor_class(kind).from_pretrained(folder, local_files_only=True))
        gradient = np.linspace(0, 255, 40 * 50 * 3).reshape(40, 50, 3).astype(np.uint8)
        made = processor([Image.fromarray(gradient)])
    except Exception as error:  # a wrong value ends in any kind; all mean the same to a user
        raise UserError(f"{path} fits no picture ({first_line(error)}); download it again") from error
    if side and made.shape[2:] != (side, side):
        raise UserError(f"{path} makes pictures of {made.shape[2]}x{made.shape[3]}, the network takes {side}x{side}")
    if not torch.isfinite(made).all():
        raise UserError(f"{path} makes values that are no numbers; download it again")
    return processor
