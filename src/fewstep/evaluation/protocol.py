"""Which pictures a figure is measured on: those of one seed, classes or prompts in turn, in the model's own way of sampling."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fewstep.models.model import AnyModel

Sampler = Callable[[int, int], Tensor]  # (first image, number) -> images (B, C, H, W) in [-1, 1]


def model_sampler(
    model: AnyModel, seed: int, *, prompts: Sequence[str] | None = None, num_steps: int | None = None,
    guidance_scale: float = 1.0,
) -> tuple[Sampler, int]:  # fmt: skip
    """Pictures of a seed, and the network evaluations behind each.

    Picture i depends on (seed, i) only. A generator runs in the steps and without the guidance that travel with it.

    Args:
        prompts: in turn; None or empty: all classes in turn.
        num_steps: of a teacher; None is its default.
        guidance_scale: of a teacher.
    """
    asked: Any = model  # classes and prompts have one calling convention, the first argument apart
    how: dict[str, Any] = {}
    if not model.card.step_indices:
        steps = {} if num_steps is None else {"num_steps": num_steps}
        how = {**steps, "guidance_scale": guidance_scale}
        evaluations = asked.evaluations(**steps)
    else:
        evaluations = asked.evaluations()

    def sample(first: int, count: int) -> Tensor:
        wanted = [prompts[number % len(prompts)] for number in range(first, first + count)] if prompts else count
        return asked.sample(wanted, seed=seed, batch_size=count, first=first, **how)

    return sample, evaluations
