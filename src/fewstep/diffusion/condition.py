"""What a model is conditioned on, as one immutable object with its unconditional twin."""

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Conditions of a batch: class labels, or text with what its family adds. Absent parts are None.

    Attributes:
        batch_size: B, needed where there is no tensor to read it from.
        class_labels: one-hot rows, (B, num_classes), float32; all zeros is unconditional.
        text: token embeddings, (B, T, D).
        pooled: pooled text embedding, (B, P).
        time_ids: original size, crop and target size in pixels, (B, 6) (SDXL).
        empty_text: what replaces `text` in the unconditional branch, (1, T, D).
        empty_pooled: what replaces `pooled` there, (1, P).
    """

    batch_size: int
    class_labels: Tensor | None = None
    text: Tensor | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    empty_text: Tensor | None = None
    empty_pooled: Tensor | None = None

    @classmethod
    def from_labels(cls, labels: Tensor, num_classes: int) -> "Condition":
        """One-hot conditions from integer labels (B,); num_classes 0 gives the empty condition."""
        if not num_classes:
            return cls(len(labels))
        return cls(len(labels), F.one_hot(labels.long(), num_classes).float())

    def unconditional(self) -> "Condition":
        """The twin that carries no information, as classifier-free guidance needs it; time ids stay.

        Raises:
            ValueError: there is text but no empty text to replace it.
        """
        for part, empty in (("text", self.empty_text), ("pooled", self.empty_pooled)):
            if getattr(self, part) is not None and empty is None:
                raise ValueError(f"this condition has no unconditional branch: empty_{part} is missing")
        return replace(
            self,
            class_labels=None if self.class_labels is None else torch.zeros_like(self.class_labels),
            text=_expanded(self.empty_text, self.batch_size),
            pooled=_expanded(self.empty_pooled, self.batch_size),
        )

    def __len__(self) -> int:
        return self.batch_size

    def __getitem__(self, rows: slice) -> "Condition":
        size = len(range(*rows.indices(self.batch_size)))
        return replace(self, batch_size=size, **{name: part[rows] for name, part in self._rows().items()})

    def to(self, device: torch.device | str) -> "Condition":
        """The same conditions on another device."""
        parts = {**self._rows(), **self._shared()}
        moved: dict[str, Any] = {name: part.to(device, non_blocking=True) for name, part in parts.items()}
        return replace(self, **moved)

    @staticmethod
    def cat(parts: "list[Condition]") -> "Condition":
        """Concatenate along the batch; parts without samples are skipped, the unconditional branch is the first part's.

        Raises:
            ValueError: the parts are conditioned on different things.
        """
        parts = [part for part in parts if len(part)] or parts[:1]
        rows = [part._rows() for part in parts]
        if any(row.keys() != rows[0].keys() for row in rows):
            kinds = sorted({", ".join(row) or "nothing" for row in rows})
            raise ValueError(f"conditions on different things cannot be concatenated: {' / '.join(kinds)}")
        size = sum(len(part) for part in parts)
        return replace(parts[0], batch_size=size, **{name: torch.cat([row[name] for row in rows]) for name in rows[0]})

    def _rows(self) -> dict[str, Tensor]:
        """The parts with one row a sample."""
        return {name: part for name, part in self._tensors().items() if not name.startswith("empty_")}

    def _shared(self) -> dict[str, Tensor]:
        """The parts with one row for all samples."""
        return {name: part for name, part in self._tensors().items() if name.startswith("empty_")}

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class ConditionTable(Protocol):
    """All conditions of a run by number: classes, or the prompts of a list."""

    @property
    def num_rows(self) -> int:
        """How many there are."""

    def rows(self, index: Tensor) -> Condition:
        """The conditions at these numbers (B,), on the index's device."""


@dataclass(frozen=True)
class ClassTable:
    """Condition i is class i; without classes there is one row, the empty condition."""

    num_classes: int

    @property
    def num_rows(self) -> int:
        """Classes, at least 1."""
        return max(1, self.num_classes)

    def rows(self, index: Tensor) -> Condition:
        return Condition.from_labels(index, self.num_classes)


def _expanded(row: Tensor | None, size: int) -> Tensor | None:
    return None if row is None else row.expand(size, *row.shape[1:])
