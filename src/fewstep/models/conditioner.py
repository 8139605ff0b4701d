"""What a model is asked for: classes by number, or prompts through text encoders; and its unconditional twin."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from fewstep.diffusion.condition import ClassTable, Condition, ConditionTable
from fewstep.errors import UserError
from fewstep.families.family import Family

if TYPE_CHECKING:
    from fewstep.networks.text_encoders import TextEmbeddings, TextEncoders

Size = tuple[int, int]


class Conditioner(ABC):
    """Turns what a user asks for into conditions.

    Attributes:
        takes: "labels" (class numbers, or nothing for unconditional models) or "prompts".
        every: all conditions there are; None for prompts, of which there is no end.
        device: where conditions are made.
    """

    takes: Literal["labels", "prompts"]
    every: ConditionTable | None = None
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def wishes(self, what: Any, labels: Sequence[int] | None, num_images: int | None, first: int) -> list[Any]:
        """One label or prompt for each picture, from the arguments of `Model.sample`.

        Raises:
            UserError: they contradict each other, or name what the model does not have.
        """

    @abstractmethod
    def table(self, wishes: Any, size: Size, empty: Any = None) -> ConditionTable:
        """The conditions of a list of labels or prompts, by number.

        Args:
            wishes: labels, prompts, or an `EmbeddingSource`.
            size: height and width of the pictures in pixels.
            empty: the unconditional row, where it is not the model's own.
        """

    @abstractmethod
    def negative(self, prompt: str) -> Any:
        """The unconditional row that leads away from a prompt, for `table`.

        Raises:
            UserError: the model takes no prompts.
        """

    @property
    def encoders(self) -> "TextEncoders":
        """The text encoders; raises UserError where the model takes no prompts."""
        raise UserError("this model takes no prompts: it has no text encoders")

    def warnings(self, wishes: Iterable[Any]) -> list[str]:
        """Lines on what the model cannot take in whole; none where all is well."""
        return []

    def to(self, device: torch.device) -> "Conditioner":
        """Make conditions on this device from now on."""
        self.device = device
        return self

    @abstractmethod
    def read(self) -> None:
        """Read the text encoders now, where there are any."""

    @abstractmethod
    def release(self) -> None:
        """Free the text encoders, where there are any; they are read again when next needed."""


@dataclass(eq=False)
class LabelConditioner(Conditioner):
    """Classes by number; without classes there is one condition, the empty one.

    Attributes:
        num_classes: 0 for unconditional models.
        class_names: for people; empty where unknown.
    """

    num_classes: int
    class_names: tuple[str, ...] = ()
    takes: Literal["labels", "prompts"] = "labels"

    def __post_init__(self) -> None:
        self.every = self.classes = ClassTable(self.num_classes, self.class_names)

    def wishes(self, what: Any, labels: Sequence[int] | None, num_images: int | None, first: int) -> list[Any]:
        if what is not None and labels is not None and not is_count(what):
            raise UserError("labels are given twice: leave out one of the two")
        if isinstance(what, Sequence) and not isinstance(what, str) and labels is None:
            what, labels = None, what
        if what is not None and not is_count(what):
            raise UserError(f"{what!r}: this model takes no prompts; {self._advice()}")
        if what is not None and num_images is not None:
            raise UserError(f"the number of pictures is given twice: {what} and num_images={num_images}")
        count = what if what is not None else num_images
        if labels is None:
            count = 1 if count is None else count
            return [number % max(1, self.num_classes) for number in range(first, first + count)]
        if not isinstance(labels, Iterable):
            raise UserError(f"labels={labels!r}: give a list of class numbers, e.g. labels=[{labels!r}]")
        given = list(map(whole_number, labels))
        self._check(given)
        if count is not None and count != len(given):
            raise UserError(f"{len(given)} labels for {count} images: give one label per image")
        return given

    def table(self, wishes: Any, size: Size, empty: Any = None) -> ConditionTable:
        return _LabelList(self.classes, torch.tensor(list(wishes), dtype=torch.int64))

    def negative(self, prompt: str) -> Any:
        raise UserError("negative_prompt is for text-to-image teachers; this model has classes")

    def read(self) -> None:
        pass

    def release(self) -> None:
        pass

    def _check(self, labels: list[Any]) -> None:
        if any(isinstance(label, str) for label in labels):
            raise UserError(f"{labels[0]!r}: this model takes no prompts; {self._advice()}")
        if not all(is_count(label) and label < max(1, self.num_classes) for label in labels):
            wrong = sorted({label for label in labels if not is_count(label) or label >= max(1, self.num_classes)})
            raise UserError(f"labels {wrong[:5]} do not fit the model's {self.num_classes} classes")

    def _advice(self) -> str:
        if not self.num_classes:
            return "it is unconditional: give the number of pictures, e.g. sample(4)"
        known = [f"{number} {name}" for number, name in enumerate(self.class_names[:3])]
        names = f" ({', '.join(known)}, ...)" if known else ""
        return f"give class numbers, e.g. labels=[0, {self.num_classes - 1}]{names}"


@dataclass(frozen=True)
class _LabelList:
    """Condition i is the class of label i."""

    classes: ClassTable
    labels: Tensor
    noun: str = "classes"
    on_host = False

    @property
    def num_rows(self) -> int:
        """Number of labels."""
        return len(self.labels)

    def rows(self, index: Tensor, device: torch.device | None = None) -> Condition:
        return self.classes.rows(self.labels.to(index.device)[index], device)

    def names(self, index: Tensor) -> list[str]:
        """The classes at these numbers, for people."""
        return self.classes.names(self.labels[index.cpu()])


class EmbeddingSource(Protocol):
    """Embeddings of a list of prompts, by row."""

    def __len__(self) -> int:
        """Number of prompts."""

    def rows(self, index: Tensor) -> "TextEmbeddings":
        """Embeddings of the prompts at these rows (B,)."""

    def texts(self, index: Tensor) -> list[str]:
        """The prompts at these rows (B,)."""


@dataclass(frozen=True)
class LiveEmbeddings:
    """Encodes prompts whenever they are asked for; the encoders stay in memory."""

    encoders: "TextEncoders"
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Tensor) -> "TextEmbeddings":
        return self.encoders.encode(self.texts(index))

    def texts(self, index: Tensor) -> list[str]:
        return [self.prompts[number] for number in index.tolist()]


@dataclass(frozen=True)
class PromptTable:
    """The conditions of a prompt list: condition i is prompt i.

    Attributes:
        source: embeddings by row.
        empty: one row for the unconditional branch.
        family: says what else the network reads beside the embeddings.
        size: height and width of the pictures in pixels.
    """

    source: EmbeddingSource
    empty: "TextEmbeddings"
    family: Family
    size: Size
    noun: str = "prompts"
    on_host = True
    # copied to each device once
    _empty_on: "dict[torch.device, TextEmbeddings]" = field(default_factory=dict, init=False)

    @property
    def num_rows(self) -> int:
        """Number of prompts."""
        return len(self.source)

    def rows(self, index: Tensor, device: torch.device | None = None) -> Condition:
        device = index.device if device is None else device
        if device not in self._empty_on:
            self._empty_on[device] = self.empty.to(device)
        return self.family.condition(self.source.rows(index.cpu()).to(device), self._empty_on[device], self.size)

    def names(self, index: Tensor) -> list[str]:
        """The prompts at these numbers."""
        return self.source.texts(index.cpu())


class PromptConditioner(Conditioner):
    """Prompts through the text encoders of a folder, which are read when first needed.

    Args:
        family: of the model.
        folder: a diffusers folder.
        example: a condition that its network takes.
    """

    takes = "prompts"

    def __init__(self, family: Family, folder: Path, example: Condition) -> None:
        self.family, self.folder = family, folder
        self.widths = {name: part.shape[-1] for name, part in example.parts.items() if name in ("text", "pooled")}

    @cached_property
    def encoders(self) -> "TextEncoders":
        """The text encoders; `release` frees them."""
        return self.family.text_encoders(self.folder).to(self.device)

    @cached_property
    def empty(self) -> "TextEmbeddings":
        """The unconditional row."""
        return self.encoders.encode_empty()

    def wishes(self, what: Any, labels: Sequence[int] | None, num_images: int | None, first: int) -> list[Any]:
        if labels is not None:
            raise UserError("labels are for models with classes; this one takes prompts")
        prompts = [what] if isinstance(what, str) else what
        if not isinstance(prompts, Sequence) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError('this model takes prompts: give one, or a list of them, e.g. sample("red apple")')
        if num_images is None:
            return list(prompts)
        if not prompts and num_images:
            raise UserError("the list of prompts is empty")
        return [prompts[number % len(prompts)] for number in range(first, first + num_images)]

    def table(self, wishes: Any, size: Size, empty: Any = None) -> PromptTable:
        source = LiveEmbeddings(self.encoders, wishes) if isinstance(wishes, list) else wishes
        empty = self.empty if empty is None else empty
        given = {"text": empty.text, "pooled": empty.pooled}
        for name, width in self.widths.items():
            part = given[name]
            if part is None or part.shape[-1] != width:
                raise UserError(
                    f"{self.folder}: its text encoders give {name} embeddings of width {0 if part is None else part.shape[-1]}, its "
                    f"network takes {width}; one of the two is another model's, or its config.json is damaged"
                )
        return PromptTable(source, empty, self.family, size)

    def negative(self, prompt: str) -> Any:
        return self.encoders.encode([prompt])

    def warnings(self, wishes: Iterable[Any]) -> list[str]:
        """A line on prompts that the text encoders do not see the whole of."""
        encoders = self.encoders
        cut = [(prompt, part) for prompt in wishes if (part := encoders.cut_part(prompt))]
        if not cut:
            return []
        prompt, part = cut[0]
        others = f", and parts of {len(cut) - 1} other prompt{'s' * (len(cut) > 2)}" * (len(cut) > 1)
        return [
            f"warning: the text encoders read {encoders.max_tokens} tokens of a prompt; of {prompt[:40]!r}... "
            f"({encoders.count_tokens(prompt)} tokens) the pictures will not show {part!r}{others}"
        ]

    def to(self, device: torch.device) -> "PromptConditioner":
        self.device = device
        if "encoders" in vars(self):
            self.encoders.to(device)
        return self

    def read(self) -> None:
        assert self.encoders is not None

    def release(self) -> None:
        vars(self).pop("encoders", None)


def whole_number(value: Any) -> Any:
    """A whole number of numpy or torch as Python's own; anything else as it is, for whoever checks it."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def refuse_no_counts(**counts: Any) -> None:
    """Raise UserError, by its name, for what is neither None nor a whole number from 0 on."""
    for name, count in counts.items():
        if count is not None and not is_count(count):
            raise UserError(f"{name}={count!r}: give a whole number of 0 or more")


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
