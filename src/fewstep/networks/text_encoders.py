"""Prompts to embeddings, with the text encoders of a diffusers folder and the pipeline's own rules."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from torch import Tensor

from fewstep.diffusion.condition import Condition, Empty
from fewstep.errors import UserError
from fewstep.formats.diffusers_index import read_model_index
from fewstep.networks.components import load_component, quiet_loading

_PIPELINES = {
    "sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline",
}  # fmt: skip


_COMPONENTS = {
    "vae", "unet", "transformer", "safety_checker", "feature_extractor", "image_encoder", "text_encoder_3", "tokenizer_3",
}  # fmt: skip  # optional or unused here


class TextEmbeddings(NamedTuple):
    """What the text encoders of one family make of N prompts."""

    text: Tensor  # (N, T, D), float32
    pooled: Tensor | None  # (N, P), float32; None where the family has none

    def rows(self, index: Any) -> "TextEmbeddings":
        """Some of the rows."""
        return TextEmbeddings(self.text[index], None if self.pooled is None else self.pooled[index])

    def to(self, device: torch.device | str) -> "TextEmbeddings":
        """On another device, as float32."""
        pooled = None if self.pooled is None else self.pooled.to(device, torch.float32)
        return TextEmbeddings(self.text.to(device, torch.float32), pooled)


class TextEncoders:
    """The tokenizers and text encoders of one model.

    Args:
        folder: a diffusers folder with model_index.json.
        family: "sd", "sdxl" or "sd3".

    Raises:
        UserError: a component is missing or damaged; names it.
    """

    def __init__(self, folder: Path, family: str) -> None:
        self.folder, self.family = folder, family
        index = read_model_index(folder)
        names = [name for name in index if name.startswith(("text_encoder", "tokenizer"))]
        with quiet_loading():  # of what transformers says on being imported
            kind = getattr(diffusers, _PIPELINES[family])
        others: dict[str, Any] = {
            name: None
            for name in inspect.signature(kind.__init__).parameters
            if name in _COMPONENTS and name not in names
        }
        if family == "sd":
            others["requires_safety_checker"] = False
        for name in names:
            if not (folder / name).is_dir():
                raise UserError(f"{folder} is incomplete: its component {name} is missing; download it again")
        for name in names:
            encoder = getattr(transformers, str(index[name][1]), None)
            if name.startswith("text_encoder") and encoder is not None:
                others[name] = load_component(encoder, folder / name)
        try:
            with quiet_loading():
                self._pipeline: Any = kind.from_pretrained(
                    folder, local_files_only=True, use_safetensors=True, **others
                )
        except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: its text encoders cannot be loaded ({str(error).splitlines()[0]})") from error
        for name in names:
            module = getattr(self._pipeline, name)
            if isinstance(module, torch.nn.Module):
                module.float().eval().requires_grad_(False)
        if family == "sd3":
            config = json.loads((folder / "transformer/config.json").read_text(encoding="utf-8"))
            self._pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**config))

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The text encoders."""
        parts = (getattr(self._pipeline, f"text_encoder{suffix}", None) for suffix in ("", "_2", "_3"))
        return [part for part in parts if part is not None]

    @property
    def device(self) -> torch.device:
        """Where the encoders are."""
        return next(self.modules[0].parameters()).device

    def to(self, device: torch.device | str) -> "TextEncoders":
        """Move the encoders."""
        for module in self.modules:
            module.to(device)
        return self

    @property
    def max_tokens(self) -> int:
        """Longest prompt in tokens, start and end included; the longest of the model's tokenizers."""
        lengths = [self._pipeline.tokenizer.model_max_length]
        if getattr(self._pipeline, "text_encoder_3", None) is not None:
            lengths.append(256)  # the pipeline's own limit for T5
        return max(lengths)

    @property
    def _tokenizer(self) -> Any:
        """The one with the most tokens."""
        has_t5 = getattr(self._pipeline, "text_encoder_3", None) is not None
        return self._pipeline.tokenizer_3 if has_t5 else self._pipeline.tokenizer

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt, start and end included."""
        return len(self._tokenizer(prompt, truncation=False, verbose=False).input_ids)

    def cut_part(self, prompt: str) -> str:
        """The end of a prompt beyond `max_tokens`, which the encoders do not see; empty for one that fits."""
        tokenizer = self._tokenizer
        tokens = tokenizer(prompt, truncation=False, verbose=False).input_ids
        return str(tokenizer.decode(tokens[self.max_tokens - 1 : -1])).strip()  # each text ends with an end token

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextEmbeddings:
        """Embeddings of N prompts as the model's own pipeline makes them; longer ones are cut at `max_tokens`, silently."""
        options = {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        if self.family == "sd3":
            options |= {"prompt_2": None, "prompt_3": None}
        with quiet_loading():  # the libraries say of each cut prompt, and for SD 3 of ones that its T5 sees whole
            encoded = self._pipeline.encode_prompt(prompts, **options)
        return TextEmbeddings(encoded[0].float(), encoded[2].float() if self.family != "sd" else None)

    def encode_empty(self) -> TextEmbeddings:
        """One row for the unconditional branch: zeros for SDXL (where its config says so), else the empty prompt."""
        empty = self.encode([""])
        if self.family == "sdxl" and self._pipeline.config.force_zeros_for_empty_prompt:
            assert empty.pooled is not None
            return TextEmbeddings(torch.zeros_like(empty.text), torch.zeros_like(empty.pooled))
        return empty


def text_condition(
    embeddings: TextEmbeddings, empty: TextEmbeddings, family: str, height: int, width: int
) -> Condition:
    """The condition of N rows; SDXL's time ids are (height, width, 0, 0, height, width) in pixels."""
    size = len(embeddings.text)
    parts, rows = {"text": embeddings.text}, dict[str, Empty](text=empty.text)
    if embeddings.pooled is not None:
        assert empty.pooled is not None
        parts["pooled"], rows["pooled"] = embeddings.pooled, empty.pooled
    if family == "sdxl":
        values = torch.tensor([height, width, 0, 0, height, width], device=embeddings.text.device)
        parts["time_ids"], rows["time_ids"] = values.float().expand(size, 6), "same"
    return Condition(size, parts, rows)
