"""What a family says of its text encoders: which components of which classes, and how its own pipeline calls them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Encoded: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]


def read_text_and_pooled(encoded: Any) -> Encoded:
    """(text, its negative, pooled, ...), of pipelines with a pooled embedding."""
    return encoded[0].float(), encoded[2].float(), None


def read_text_alone(encoded: Any) -> Encoded:
    """(text (N, T, D), ...), all T tokens of it read by the network."""
    return encoded[0].float(), None, None


def read_text_list(encoded: Any) -> Encoded:
    """([text (T_i, D) of each prompt], ...), of pipelines whose networks take lists."""
    rows = [row.float() for row in encoded[0]]
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    return pad_sequence(rows, batch_first=True), None, lengths


def read_text_masked(encoded: Any) -> Encoded:
    """(text (N, T, D), which of its tokens are a prompt's own (N, T) or None for all), the others behind them."""
    text, mask = encoded[0].float(), encoded[1]
    full = torch.full((len(text),), text.shape[1], device=text.device)
    return text, None, full if mask is None else mask.long().sum(1)


@dataclass(frozen=True)
class TextLayout:
    """The text encoders of one family.

    Attributes:
        family: its name, as stored embeddings call it.
        title: what people call it.
        pipeline: the diffusers pipeline whose `encode_prompt` is the rule.
        components: in a model's folder, each with the classes it may have; no other class is ever looked up.
        optional: those of them that a folder may lack.
        pipeline_options: how the pipeline is built.
        index_options: entries of model_index.json that the pipeline is built with, where they are there.
        encode_options: further arguments of `encode_prompt`.
        read_encoded: what `encode_prompt` returned -> text (N, T, D), pooled (N, P) or None, tokens a prompt (N,) or None.
        chat: puts a prompt into the tokenizer's chat template, as the pipeline does: (tokenizer, prompt) -> text; None: it
            takes prompts as they are.
        empty_prompt: the unconditional row's prompt, where its authors advise another than none.
        zeros_option: the pipeline's own setting that makes the unconditional row zeros; empty: the empty prompt.
        network: the component whose config the pipeline reads while encoding; empty: none.
        min_layers: of its text encoder, where the pipeline reads hidden states between its layers.
        token_limits: longest prompts of tokenizers whose own setting is not what the pipeline goes by.
    """

    family: str
    title: str
    pipeline: str
    components: Mapping[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()
    pipeline_options: Mapping[str, Any] = field(default_factory=dict)
    index_options: tuple[str, ...] = ()
    encode_options: Mapping[str, Any] = field(default_factory=dict)
    read_encoded: Callable[[Any], Encoded] = read_text_and_pooled
    chat: Callable[[Any, str], str] | None = None
    empty_prompt: str = ""
    zeros_option: str = ""
    network: str = ""
    min_layers: int = 0
    token_limits: Mapping[str, int] = field(default_factory=dict)
