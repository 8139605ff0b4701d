"""Prompts to embeddings, with the text encoders of a diffusers folder and the pipeline's own rules."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from torch import Tensor

from fewstep.diffusion.condition import join_rows
from fewstep.errors import UserError, first_line
from fewstep.formats.diffusers_index import INDEX, read_json, read_model_index
from fewstep.networks.components import load_component, load_tokenizer, quiet_loading
from fewstep.networks.frozen_layers import Base, store_linears
from fewstep.networks.text_layout import TextLayout

_MOST_TOKENS = 100_000  # transformers' word for "no limit" is far above, any encoder's limit far below
_PLACE = "fewstep"  # where a prompt stands in a chat template


class TextEmbeddings(NamedTuple):
    """What the text encoders of one family make of N prompts."""

    text: Tensor  # (N, T, D), float32
    pooled: Tensor | None = None  # (N, P), float32; None where the family has none
    lengths: Tensor | None = None  # (N,), int64: tokens of each prompt, zeros follow them; None where all are T

    def rows(self, index: Any) -> "TextEmbeddings":
        """Some of the rows."""
        return TextEmbeddings(*(None if part is None else part[index] for part in self))  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> "TextEmbeddings":
        """On another device, as float32; prompts of different lengths no wider than the longest.

        Nobody waits for a copy to a device; one to the host has arrived when this returns.
        """
        text, pooled, lengths = self
        waits = torch.device(device).type == "cpu"
        if lengths is not None:
            text = text[:, : max(1, int(lengths.max()))] if len(lengths) else text[:, :1]
            lengths = lengths.to(device, non_blocking=not waits)
        pooled = None if pooled is None else pooled.to(device, torch.float32, non_blocking=not waits)
        return TextEmbeddings(text.to(device, torch.float32, non_blocking=not waits), pooled, lengths)

    @classmethod
    def cat(cls, parts: "list[TextEmbeddings]") -> "TextEmbeddings":
        """The rows of several, those of shorter prompts padded with zeros."""
        text, pooled, lengths = (
            None if column[0] is None else join_rows(list(column)) for column in zip(*parts, strict=True)
        )
        assert text is not None
        return cls(text, pooled, lengths)


class TextEncoders:
    """The tokenizers and text encoders of one model.

    Nothing of the folder chooses a class: the family's layout names those there may be. The pipeline is built around
    the loaded components, so that no code beside them is ever looked for.

    Args:
        folder: a diffusers folder with model_index.json.
        layout: of the model's family.

    Raises:
        UserError: a component is missing, damaged or of another class; names it.
    """

    def __init__(self, folder: Path, layout: TextLayout) -> None:
        self.folder, self.layout, self.family = folder, layout, layout.family
        parts = {name: _load_part(folder, name, kind) for name, kind in _part_classes(folder, layout).items()}
        index = read_json(folder / INDEX, folder, "model_index")
        chosen = {name: index[name] for name in layout.index_options if name in index}
        with quiet_loading():  # of what transformers says on being imported
            kind: Any = getattr(diffusers, layout.pipeline)
            needed = inspect.signature(kind.__init__).parameters.values()
            absent = {part.name: None for part in needed if part.default is part.empty and part.name != "self"}
            scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)  # some versions look at one
            options = {**absent, **layout.pipeline_options, **chosen, "scheduler": scheduler, **parts}
            self._pipeline: Any = kind(**options)
        _refuse_unmatched(folder, parts, self._limits, layout)
        _refuse_other_templates(folder, self._tokenizer, layout)
        for module in self.modules:
            module.float().eval().requires_grad_(False)
        if layout.network:
            config = read_json(folder / layout.network / "config.json", folder, layout.network)
            setattr(self._pipeline, layout.network, SimpleNamespace(config=SimpleNamespace(**config)))

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The text encoders."""
        parts = (getattr(self._pipeline, name, None) for name in self.layout.components)
        return [part for part in parts if isinstance(part, torch.nn.Module)]

    @property
    def device(self) -> torch.device:
        """Where the encoders are."""
        return next(self.modules[0].parameters()).device

    def to(self, device: torch.device | str) -> "TextEncoders":
        """Move the encoders."""
        for module in self.modules:
            module.to(device)
        return self

    def store(self, base: Base) -> "TextEncoders":
        """Keep their linear layers in 8 or 4 bits; fp32 and bf16 leave everything in float32.

        Raises:
            UserError: a weight is not finite.
        """
        if base == "int8" or base == "nf4":
            for module in self.modules:
                store_linears(module, base)
        return self

    @property
    def max_tokens(self) -> int:
        """Longest prompt in tokens, start and end included; the longest of the model's tokenizers."""
        return max(self._limits.values())

    @property
    def _limits(self) -> dict[str, int]:
        """Tokens that each tokenizer's encoder reads."""
        tokenizers = {name: getattr(self._pipeline, name, None) for name in self.layout.components}
        return {
            name: self.layout.token_limits.get(name, int(getattr(tokenizer, "model_max_length", 0)))
            for name, tokenizer in tokenizers.items()
            if tokenizer is not None and name.startswith("tokenizer")
        }

    @property
    def _tokenizer(self) -> Any:
        """The last of those with the most tokens, as the pipeline has them."""
        limits = self._limits
        return getattr(self._pipeline, max(limits, key=lambda name: (name in self.layout.token_limits, limits[name])))

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt, start and end (or its chat template) included."""
        return len(self._tokens(prompt))

    def cut_part(self, prompt: str) -> str:
        """The end of a prompt beyond `max_tokens`, which the encoders do not see; empty for one that fits."""
        tokens = self._tokens(prompt)
        if self.layout.chat is None:
            return str(self._tokenizer.decode(tokens[self.max_tokens - 1 : -1])).strip()  # each ends with an end token
        after = self.layout.chat(self._tokenizer, _PLACE).partition(_PLACE)[2]
        return str(self._tokenizer.decode(tokens[self.max_tokens :])).removesuffix(after).strip()

    def _tokens(self, prompt: str) -> list[int]:
        _refuse_half_characters([prompt])
        tokenizer = self._tokenizer
        text = prompt if self.layout.chat is None else self.layout.chat(tokenizer, prompt)
        return list(tokenizer(text, truncation=False, verbose=False).input_ids)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextEmbeddings:
        """Embeddings of N prompts as the model's own pipeline makes them; longer ones are cut at `max_tokens`, silently."""
        _refuse_half_characters(prompts)
        options = {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        taken = inspect.signature(self._pipeline.encode_prompt).parameters
        options = {name: value for name, value in options.items() if name in taken}
        with quiet_loading():  # the libraries say of each cut prompt, and of ones that another encoder sees whole
            encoded = self._pipeline.encode_prompt(list(prompts), **options, **self.layout.encode_options)
        return TextEmbeddings(*self.layout.read_encoded(encoded))

    def encode_empty(self) -> TextEmbeddings:
        """One row for the unconditional branch: zeros where the model's config says so, else the empty prompt."""
        empty = self.encode([self.layout.empty_prompt])
        if self.layout.zeros_option and self._pipeline.config[self.layout.zeros_option]:
            pooled = None if empty.pooled is None else torch.zeros_like(empty.pooled)
            return TextEmbeddings(torch.zeros_like(empty.text), pooled, empty.lengths)
        return empty


def _refuse_half_characters(prompts: list[str]) -> None:
    """Raise UserError for what no tokenizer takes: bytes of a command line that are not UTF-8, or half of a pair."""
    for prompt in prompts:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"the prompt {prompt[:60]!r} holds half a character; type it again, as UTF-8") from None


def _refuse_unmatched(folder: Path, parts: dict[str, Any], limits: dict[str, int], layout: TextLayout) -> None:
    """Raise UserError for a tokenizer without a limit, or another one's, or with tokens that its encoder does not have."""
    own = {name: limit for name, limit in limits.items() if name not in layout.token_limits}
    if len(set(own.values())) > 1:
        said = ", ".join(f"{name} {limit}" for name, limit in own.items())
        raise UserError(
            f"{folder}: its tokenizers say other numbers of tokens (model_max_length: {said}), and the embeddings are put side "
            "by side; download it again"
        )
    for name, limit in limits.items():
        if limit > _MOST_TOKENS:
            raise UserError(
                f"{folder / name}: its tokenizer_config.json does not say how many tokens the encoder reads (model_max_length); "
                "download it again"
            )
    for name, limit in own.items():
        encoder = parts.get(name.replace("tokenizer", "text_encoder"))
        config = None if encoder is None else encoder.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and limit > positions:
            raise UserError(
                f"{folder / name} cuts prompts at {limit} tokens (model_max_length), its encoder has places for {positions}; one of the "
                "two is another model's"
            )
    for name, encoder in parts.items():
        layers = int(getattr(getattr(encoder, "config", None), "num_hidden_layers", layout.min_layers))
        if name == "text_encoder" and layers < layout.min_layers:
            raise UserError(
                f"{folder / name} has {layers} layers; {layout.title} reads its text between them, up to layer {layout.min_layers}"
            )
        tokenizer = parts.get(name.replace("text_encoder", "tokenizer"))
        if name.startswith("text_encoder") and tokenizer is not None:
            last, known = max(tokenizer.get_vocab().values()), int(encoder.config.get_text_config().vocab_size)
            if last >= known:
                raise UserError(
                    f"{folder / name.replace('text_encoder', 'tokenizer')} has a token of number {last}, its encoder knows "
                    f"{known}; download the model again"
                )


def _refuse_other_templates(folder: Path, tokenizer: Any, layout: TextLayout) -> None:
    """Raise UserError for a chat template that is missing, cannot be filled in or leaves the prompt out."""
    if layout.chat is None:
        return
    try:
        with quiet_loading():
            text = layout.chat(tokenizer, _PLACE)
    except Exception as error:  # of a template in any kind; all mean the same to a user
        raise UserError(
            f"{folder / 'tokenizer'}: its chat template is missing or damaged ({first_line(error)}); download it again"
        ) from error
    if _PLACE not in text:
        raise UserError(f"{folder / 'tokenizer'}: its chat template leaves the prompt out; download it again")


def _part_classes(folder: Path, layout: TextLayout) -> dict[str, str]:
    """The class of every text component, of those the family knows; all are there and none is another's."""
    index = read_model_index(folder)
    missing = [name for name in layout.components if name not in index and name not in layout.optional]
    if missing:
        raise UserError(
            f"{folder}: {layout.title} needs {' and '.join(missing)}, which {INDEX} does not name; a model without them, such "
            "as a refiner, makes no pictures from text alone"
        )
    other = [name for name in index if name.startswith(("text_encoder", "tokenizer")) and name not in layout.components]
    if other:
        raise UserError(f"{folder}: {layout.title} does not have {' and '.join(other)}, which {INDEX} names")
    classes = {name: str(index[name][1]) for name in layout.components if name in index}
    for name, kind in classes.items():
        if not (folder / name).is_dir():
            raise UserError(f"{folder} is incomplete: its component {name} is missing; download it again")
        if kind not in layout.components[name]:
            known = " or ".join(layout.components[name])
            raise UserError(f"{folder}: its {name} is a {kind}; of {layout.title} this version reads {known}")
    return classes


def _load_part(folder: Path, name: str, kind: str) -> Any:
    with quiet_loading():
        found: Any = getattr(transformers, kind)
    return (load_tokenizer if name.startswith("tokenizer") else load_component)(found, folder / name)
