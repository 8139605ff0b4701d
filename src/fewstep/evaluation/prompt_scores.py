"""How well pictures show their prompts: one number a picture, by anything that looks at both."""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

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


def repeated_prompts(prompts: Sequence[str]) -> list[str]:
    """Lines where prompts stand more than once: how many, and the most frequent; and where some are empty."""
    empty = sum(not prompt.strip() for prompt in prompts)
    lines = [f"warning: {empty:,} of {len(prompts):,} prompts are empty: their pictures are of nothing in particular"]
    frequent = [(prompt, times) for prompt, times in Counter(prompts).most_common() if times > 1]
    if not frequent:
        return lines * bool(empty)
    shown = ", ".join(f"{prompt[:60]!r} {times} times" for prompt, times in frequent[:3])
    return lines * bool(empty) + [
        f"warning: {len(frequent):,} of {len(set(prompts)):,} prompts stand more than once ({shown}); each counts as often as it stands"
    ]


class TextScores:
    """What text metrics find, picture i with prompt i of those that take turns."""

    def __init__(self, metrics: Sequence[TextMetric], prompts: Sequence[str]) -> None:
        self.metrics, self.prompts = metrics, prompts

    def of(self, first: int, pictures: list[Image.Image]) -> dict[str, Tensor]:
        """The scores (B,) of pictures number `first` and following, float32, by the metrics' names."""
        prompts = [self.prompts[number % len(self.prompts)] for number in range(first, first + len(pictures))]
        return {metric.name: metric(pictures, prompts).float() for metric in self.metrics}
