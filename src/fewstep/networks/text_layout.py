"""What a family says of its text encoders: which components of which classes, and how its own pipeline calls them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
        has_pooled: whether there is a pooled embedding.
        zeros_option: the pipeline's own setting that makes the unconditional row zeros; empty: the empty prompt.
        network: the component whose config the pipeline reads while encoding; empty: none.
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
    has_pooled: bool = True
    zeros_option: str = ""
    network: str = ""
    token_limits: Mapping[str, int] = field(default_factory=dict)
