"""How well pictures show their prompts: one number a picture, by anything that looks at both."""

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor


class TextMetric(Protocol):
    """Scores pictures against their prompts. A preference model is one such class; nothing else has to know it.

    Attributes:
        name: of the value, as JSON has it ("clip_score").
        by: what computes it, and how: stands beside the value.
    """

    name: str
    by: str

    def __call__(self, pictures: list[Image.Image], prompts: Sequence[str]) -> Tensor:
        """B pictures of 8 bits and their B prompts -> (B,), higher is better."""

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """What is to be said of these prompts before anything is measured, one line each."""


class TextScores:
    """What text metrics find as pictures come by, picture i with prompt i of those that take turns."""

    def __init__(self, metrics: Sequence[TextMetric], prompts: Sequence[str]) -> None:
        self.metrics, self.prompts = metrics, prompts
        self._found: dict[str, list[Tensor]] = {metric.name: [] for metric in metrics}

    def see(self, first: int, pictures: list[Image.Image]) -> None:
        """Score pictures number `first` and following."""
        prompts = [self.prompts[number % len(self.prompts)] for number in range(first, first + len(pictures))]
        for metric in self.metrics:
            self._found[metric.name].append(metric(pictures, prompts).float())

    def found(self) -> dict[str, Tensor]:
        """The scores (N,) of all pictures seen, by the metrics' names."""
        return {name: torch.cat(parts) for name, parts in self._found.items()}
