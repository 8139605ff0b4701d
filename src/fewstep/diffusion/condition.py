"""What a model is conditioned on: named tensors with one row a sample, each with what replaces it under guidance."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor

Empty: TypeAlias = Tensor | Literal["same"]  # one row (1, ...) for all samples; "same": the part stays as it is


@dataclass(frozen=True)
class Condition:
    """Conditions of a batch, an immutable set of named tensors: `condition["text"]`.

    Text of different lengths is padded with zeros at its end, and "text_length" (B,) says how many tokens each row has; the
    unconditional row has a length of its own.

    Attributes:
        batch_size: B, needed where there is no tensor to read it from.
        parts: what the model reads, by name, (B, ...): "class_labels" (one-hot rows), "text", "pooled", ...
        empty: the unconditional row of each part, (1, ...); or "same" for one that guidance leaves as it is.
    """

    batch_size: int
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    empty: Mapping[str, Empty] = field(default_factory=dict)

    @classmethod
    def from_labels(cls, labels: Tensor, num_classes: int) -> "Condition":
        """One-hot conditions from integer labels (B,); num_classes 0 gives the empty condition."""
        if not num_classes:
            return cls(len(labels))
        return cls.from_one_hot(F.one_hot(labels.long(), num_classes).float())

    @classmethod
    def from_one_hot(cls, rows: Tensor) -> "Condition":
        """Conditions from one-hot rows (B, num_classes); all zeros is unconditional."""
        return cls(len(rows), {"class_labels": rows}, {"class_labels": rows.new_zeros(1, rows.shape[1])})

    def unconditional(self) -> "Condition":
        """The twin that carries no information, as classifier-free guidance needs it.

        Raises:
            ValueError: a part has no unconditional row.
        """
        if missing := sorted(name for name in self.parts if name not in self.empty):
            raise ValueError(f"this condition has no unconditional branch: the row of {', '.join(missing)} is missing")
        twins = {name: _twin(part, self.empty[name]) for name, part in self.parts.items()}
        return replace(self, parts=twins)

    def __len__(self) -> int:
        return self.batch_size

    def __contains__(self, name: str) -> bool:
        return name in self.parts

    @overload
    def __getitem__(self, key: str) -> Tensor: ...

    @overload
    def __getitem__(self, key: slice | Tensor) -> "Condition": ...

    def __getitem__(self, key: str | slice | Tensor) -> "Tensor | Condition":
        """A part by its name (KeyError says which there are), or some of the rows, by slice or by their numbers."""
        if isinstance(key, Tensor):
            return replace(self, batch_size=len(key), parts={name: part[key] for name, part in self.parts.items()})
        if isinstance(key, slice):
            size = len(range(*key.indices(self.batch_size)))
            return replace(self, batch_size=size, parts={name: part[key] for name, part in self.parts.items()})
        if key not in self.parts:
            raise KeyError(f"this model needs {key!r}; the condition has {', '.join(self.parts) or 'nothing'}")
        return self.parts[key]

    def get(self, name: str) -> Tensor | None:
        """A part by its name; None where there is none."""
        return self.parts.get(name)

    def to(self, device: torch.device | str) -> "Condition":
        """The same conditions on another device."""
        parts = {name: part.to(device, non_blocking=True) for name, part in self.parts.items()}
        rows: dict[str, Empty] = {
            name: row.to(device, non_blocking=True) if isinstance(row, Tensor) else row
            for name, row in self.empty.items()
        }
        return replace(self, parts=parts, empty=rows)

    @staticmethod
    def cat(parts: "list[Condition]") -> "Condition":
        """Concatenate along the batch, shorter texts padded; parts without samples are skipped, the unconditional rows are the first part's.

        Raises:
            ValueError: the parts are conditioned on different things.
        """
        parts = [part for part in parts if len(part)] or parts[:1]
        first = parts[0]
        if any(part.parts.keys() != first.parts.keys() for part in parts):
            kinds = sorted({", ".join(part.parts) or "nothing" for part in parts})
            raise ValueError(f"conditions on different things cannot be concatenated: {' / '.join(kinds)}")
        whole = {name: join_rows([part.parts[name] for part in parts]) for name in first.parts}
        return replace(first, batch_size=sum(len(part) for part in parts), parts=whole)


class ConditionTable(Protocol):
    """All conditions of a run by number: classes, or the prompts of a list."""

    @property
    def num_rows(self) -> int:
        """How many there are."""

    @property
    def noun(self) -> str:
        """What they are, in the plural: "classes" or "prompts"."""

    @property
    def on_host(self) -> bool:
        """Whether numbers are looked up in host memory: a GPU's numbers would make the host wait for it."""

    def rows(self, index: Tensor, device: torch.device | None = None) -> Condition:
        """The conditions at these numbers (B,), on a device; None: the index's."""

    def names(self, index: Tensor) -> list[str]:
        """What the conditions at these numbers (B,) are, for people: a class or prompt each; nothing where there is but one."""


@dataclass(frozen=True)
class ClassTable:
    """Condition i is class i; without classes there is one row, the empty condition."""

    num_classes: int
    class_names: tuple[str, ...] = ()
    noun: str = "classes"
    on_host = False

    @property
    def num_rows(self) -> int:
        """Classes, at least 1."""
        return max(1, self.num_classes)

    def rows(self, index: Tensor, device: torch.device | None = None) -> Condition:
        return Condition.from_labels(index.to(device or index.device, non_blocking=True), self.num_classes)

    def names(self, index: Tensor) -> list[str]:
        """Names of the classes, or "class 3" where they have none; nothing without classes."""
        if not self.num_classes:
            return []
        named = len(self.class_names) == self.num_classes
        return [self.class_names[number] if named else f"class {number}" for number in index.tolist()]


def join_rows(parts: list[Tensor]) -> Tensor:
    """Concatenate along the batch; where rows (T, ...) differ in length, shorter ones are padded with zeros at their end."""
    if len({part.shape[1:] for part in parts}) > 1:
        longest = max(part.shape[1] for part in parts)
        parts = [F.pad(part, [0, 0] * (part.ndim - 2) + [0, longest - part.shape[1]]) for part in parts]
    return torch.cat(parts)


def _twin(part: Tensor, row: Empty) -> Tensor:
    return row.expand(len(part), *row.shape[1:]) if isinstance(row, Tensor) else part
