"""The conditions of a prompt list: embeddings by row, encoded now or stored before, and the unconditional twin."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.families.registry import family_named
from fewstep.networks.text_encoders import TextEmbeddings, TextEncoders


class EmbeddingSource(Protocol):
    """Embeddings of a list of prompts, by row."""

    def __len__(self) -> int:
        """Number of prompts."""

    def rows(self, index: Tensor) -> TextEmbeddings:
        """Embeddings of the prompts at these rows (B,)."""

    def texts(self, index: Tensor) -> list[str]:
        """The prompts at these rows (B,)."""


@dataclass(frozen=True)
class LiveEmbeddings:
    """Encodes prompts whenever they are asked for; the encoders stay in memory."""

    encoders: TextEncoders
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Tensor) -> TextEmbeddings:
        return self.encoders.encode(self.texts(index))

    def texts(self, index: Tensor) -> list[str]:
        return [self.prompts[number] for number in index.tolist()]


@dataclass(frozen=True)
class PromptTable:
    """The conditions of a prompt list: condition i is prompt i.

    Attributes:
        source: embeddings by row.
        empty: one row for the unconditional branch.
        family: "sd", "sdxl" or "sd3".
        size: height and width of the pictures in pixels.
    """

    source: EmbeddingSource
    empty: TextEmbeddings
    family: str
    size: tuple[int, int]

    @property
    def num_rows(self) -> int:
        """Number of prompts."""
        return len(self.source)

    def rows(self, index: Tensor) -> Condition:
        embeddings = self.source.rows(index.cpu()).to(index.device)
        return family_named(self.family).condition(embeddings, self.empty.to(index.device), self.size)

    def texts(self, index: Tensor) -> list[str]:
        """The prompts at these numbers."""
        return self.source.texts(index.cpu())
