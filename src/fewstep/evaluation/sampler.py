"""Which pictures a figure is measured on: those of one seed, classes or prompts in turn, in the model's own way of sampling."""

from collections.abc import Callable, Sequence

from torch import Tensor

from fewstep.models.model import Model

Sampler = Callable[[int, int], Tensor]  # (first image, number) -> images (B, C, H, W) in [-1, 1]


def model_sampler(
    model: Model, seed: int, *, prompts: Sequence[str] | None = None, num_steps: int | None = None,
    guidance_scale: float | None = 1.0,
) -> tuple[Sampler, int]:  # fmt: skip
    """Pictures of a seed, and the network evaluations behind each.

    Picture i depends on (seed, i) only. A generator runs in the steps and without the guidance that travel with it.

    Args:
        prompts: in turn; None or empty: all classes in turn.
        num_steps, guidance_scale: of a teacher; None is its family's.
    """
    if model.is_generator:
        num_steps = guidance_scale = None

    def sample(first: int, count: int) -> Tensor:
        wanted = [prompts[number % len(prompts)] for number in range(first, first + count)] if prompts else None
        return model.sample(
            wanted, num_images=count, seed=seed, first=first, num_inference_steps=num_steps,
            guidance_scale=guidance_scale, batch_size=count, output="tensor", progress=False,
        )  # fmt: skip

    return sample, model.evaluations(num_steps)
