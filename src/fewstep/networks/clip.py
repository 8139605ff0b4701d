"""CLIP: pictures and texts as unit vectors of one space, whose cosine says how well they go together."""

from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fewstep.errors import UserError
from fewstep.formats.json_files import read_json_object
from fewstep.networks.components import load_component, load_tokenizer
from fewstep.networks.hub_folders import network_folder
from fewstep.networks.image_processors import FILE, ImageProcessor, load_image_processor

_FILES = (
    "config.json", FILE, "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
)  # fmt: skip
_PROCESSORS = {"CLIPImageProcessor": "CLIPImageProcessor", "CLIPFeatureExtractor": "CLIPImageProcessor"}


class Clip:
    """A CLIP of transformers with its tokenizer and image processor.

    Args:
        network: a CLIPModel.
    """

    def __init__(self, network: Any, tokenizer: Any, processor: ImageProcessor) -> None:
        self.network = network.float().eval().requires_grad_(False)
        self.tokenizer, self.processor = tokenizer, processor

    @property
    def max_tokens(self) -> int:
        """Tokens of a text that the network reads, start and end included."""
        return int(self.network.config.text_config.max_position_embeddings)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, width, pixels of a patch's side) of the network that sees pictures."""
        config = self.network.config.vision_config
        return int(config.num_hidden_layers), int(config.hidden_size), int(config.patch_size)

    def to(self, device: torch.device | str) -> "Clip":
        """Move the network."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def of_pictures(self, pictures: list[Image.Image]) -> Tensor:
        """Unit vectors (B, P), float32."""
        pixels = self.processor(pictures).to(self.network.device)
        return self._unit(self.network.visual_projection(self.network.vision_model(pixels).pooler_output))

    @torch.no_grad()
    def of_texts(self, texts: list[str]) -> Tensor:
        """Unit vectors (B, P), float32; what is longer than `max_tokens` is cut."""
        encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        tokens, mask = (encoded[key].to(self.network.device) for key in ("input_ids", "attention_mask"))
        pooled = self.network.text_model(input_ids=tokens, attention_mask=mask).pooler_output
        return self._unit(self.network.text_projection(pooled))

    def num_tokens(self, text: str) -> int:
        """Tokens of a text, start and end included."""
        return len(self.tokenizer(text, truncation=False, verbose=False).input_ids)

    @staticmethod
    def _unit(vectors: Tensor) -> Tensor:
        return functional.normalize(vectors.float(), dim=-1)


def load_clip(source: str | Path) -> Clip:
    """A CLIP of transformers, float32, on the CPU.

    Args:
        source: a folder with config.json, preprocessor_config.json, tokenizer and safetensors, or a hub id.

    Raises:
        UserError: neither, another kind of model, or a part that is missing or damaged; names it.
    """
    folder = network_folder(source, _FILES, "a CLIP", "openai/clip-vit-large-patch14")
    kind = read_json_object(folder / "config.json").get("model_type")
    if kind != "clip":
        raise UserError(f"{source} is no CLIP: its config.json has model_type {str(kind)[:40]!r}, not 'clip'")
    network = load_component(transformers.CLIPModel, folder)
    tokenizer = load_tokenizer(transformers.CLIPTokenizer, folder)
    last, known = max(tokenizer.get_vocab().values()), int(network.config.text_config.vocab_size)
    if last >= known:
        raise UserError(f"{folder}: its tokenizer has a token of number {last}, its network knows {known}")
    return Clip(network, tokenizer, load_image_processor(folder, _PROCESSORS, network.config.vision_config.image_size))
