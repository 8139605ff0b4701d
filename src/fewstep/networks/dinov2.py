"""DINOv2: pictures as vectors that were learned without labels, for distances between sets of pictures."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.formats.fingerprints import file_digest
from fewstep.formats.json_files import read_json_object
from fewstep.formats.pixels import to_pictures
from fewstep.networks.components import load_component
from fewstep.networks.image_processors import FILE, ImageProcessor, load_image_processor

KINDS = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
"""What a config.json may say under model_type -> the class of transformers that is meant."""
_PROCESSORS = {"BitImageProcessor": "BitImageProcessor"}
_RELEASED = {(12, 384): "S", (12, 768): "B", (24, 1024): "L", (40, 1536): "g"}


class Dinov2Features(nn.Module):
    """Pictures to the normalised class token of a DINOv2, fitted by the model's own image processor.

    Source: Oquab et al. 2023 (arXiv:2304.07193); as features for distances: Stein et al. 2023 (arXiv:2306.04675). Differs from
    the latter where the processor crops: the released ones resize to 256 and take the central 224 pixels.

    Args:
        network: of a class in `KINDS`.
        processor: the model's own.
        sha256: of its weights; `name` begins with it.
        fitted: what its preprocessor_config.json says.
    """

    def __init__(self, network: Any, processor: ImageProcessor, sha256: str, fitted: str) -> None:
        super().__init__()
        self.network = network.float().eval().requires_grad_(False)
        self.processor, self.fitted = processor, fitted
        config = network.config
        shape = (int(config.num_hidden_layers), int(config.hidden_size))
        size = f"ViT-{_RELEASED[shape]}" if shape in _RELEASED else f"ViT of {shape[0]} layers of {shape[1]}"
        registers = " with registers" * (config.model_type == "dinov2_with_registers")
        self.name = f"DINOv2 {size}/{config.patch_size}{registers}, sha256 {sha256[:8]}"

    def extra_repr(self) -> str:
        """What features follow from beside the weights."""
        return self.fitted

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1], grey or RGB -> (B, F), float32."""
        pixels = self.processor(to_pictures(images)).to(self.network.device)
        found: Tensor = self.network(pixels).pooler_output
        return found.float()


def load_dinov2(folder: Path) -> Dinov2Features:
    """A DINOv2 of transformers from a local folder, float32, on the CPU; no code of the folder runs, only safetensors are read.

    Raises:
        UserError: another kind of model, no or another image processor, or damaged weights; names it.
    """
    kind = str(read_json_object(folder / "config.json").get("model_type"))
    if kind not in KINDS:
        raise UserError(
            f"{folder} is no feature network: its config.json has model_type {kind[:40]!r}, not {' or '.join(KINDS)}"
        )
    network = load_component(getattr(transformers, KINDS[kind]), folder)
    processor = load_image_processor(folder, _PROCESSORS, 0)
    digests = [file_digest(path) for path in sorted(folder.glob("*.safetensors"))]
    whole = digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    return Dinov2Features(network, processor, whole, json.dumps(read_json_object(folder / FILE), sort_keys=True))
