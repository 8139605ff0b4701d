"""What a model is conditioned on, as one immutable object with its unconditional twin."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Conditions of a batch.

    Attributes:
        class_labels: one-hot rows, (B, num_classes), float32; all zeros is unconditional. None for models
            without classes.
        batch_size: B, needed where there is no tensor to read it from.
    """

    batch_size: int
    class_labels: Tensor | None = None

    @classmethod
    def from_labels(cls, labels: Tensor, num_classes: int) -> "Condition":
        """One-hot conditions from integer labels (B,); num_classes 0 gives the empty condition."""
        if not num_classes:
            return cls(len(labels))
        return cls(len(labels), F.one_hot(labels.long(), num_classes).float())

    def unconditional(self) -> "Condition":
        """The twin that carries no information, as classifier-free guidance needs it."""
        if self.class_labels is None:
            return self
        return replace(self, class_labels=torch.zeros_like(self.class_labels))

    def __len__(self) -> int:
        return self.batch_size

    def __getitem__(self, rows: slice) -> "Condition":
        size = len(range(*rows.indices(self.batch_size)))
        labels = None if self.class_labels is None else self.class_labels[rows]
        return Condition(size, labels)

    def to(self, device: torch.device | str) -> "Condition":
        """The same conditions on another device."""
        labels = None if self.class_labels is None else self.class_labels.to(device, non_blocking=True)
        return replace(self, class_labels=labels)

    @staticmethod
    def cat(parts: "list[Condition]") -> "Condition":
        """Concatenate along the batch."""
        size = sum(len(part) for part in parts)
        labels = [part.class_labels for part in parts if part.class_labels is not None]
        if labels and sum(len(rows) for rows in labels) != size:
            raise ValueError("conditions with and without class labels cannot be concatenated")
        return Condition(size, torch.cat(labels) if labels else None)
