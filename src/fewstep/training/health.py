"""Is the generator going wrong? Saturation, contrast and diversity of its samples beside the teacher's."""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# a sample set is alarming when its ratio to the teacher's leaves this range
LIMITS = {
    "saturation": (0.4, 1.6), "contrast": (0.5, 1.6), "diversity": (0.5, float("inf")), "seed_diversity": (0.5, float("inf")),
}  # fmt: skip
SEEDS = 4  # pictures of one prompt or class behind `seed_diversity`
_MEANING = {
    "saturation": "colours drift: lower the learning rates, or teacher.guidance_scale where it is above 1",
    "contrast": "contrast drifts: lower the learning rates, or teacher.guidance_scale where it is above 1",
    "diversity": "the pictures become alike: raise training.generator_every, lower the first of losses.gan_weights or the rates",
    "seed_diversity": "the pictures of one prompt or class become alike: raise training.generator_every, lower the first of losses.gan_weights or "
    "the rates",
}


@dataclass(frozen=True)
class SampleStatistics:
    """Of a set of pictures in [-1, 1].

    Attributes:
        saturation: mean over pixels of the largest minus the smallest colour channel; 0 for grey pictures.
        contrast: mean over pictures of the standard deviation of their pixels.
        diversity: mean root-mean-square difference between two pictures, each shrunk to at most 16x16 pixels.
        seed_diversity: the same between pictures of one prompt or class from different noises; 0 where none were made.
    """

    saturation: float
    contrast: float
    diversity: float
    seed_diversity: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """{name: value}."""
        return asdict(self)


def sample_statistics(images: Tensor, of_one: Tensor | None = None) -> SampleStatistics:
    """Statistics of images (N, C, H, W) in [-1, 1]; one picture alone has no diversity (0).

    Args:
        of_one: pictures of one prompt or class from different noises.

    Raises:
        ValueError: no images.
    """
    if not len(images):
        raise ValueError("no images")
    images = images.detach().float().cpu()
    saturation = (images.amax(1) - images.amin(1)).mean()
    contrast = images.flatten(1).std(1).mean()
    seeds = 0.0 if of_one is None else _difference(of_one.detach().float().cpu())
    return SampleStatistics(float(saturation), float(contrast), _difference(images), seeds)


def _difference(images: Tensor) -> float:
    """Mean root-mean-square difference between two of the pictures, shrunk; 0 for one."""
    small = F.adaptive_avg_pool2d(images, min(16, *images.shape[2:])).flatten(1)
    pairs = torch.pdist(small) / small.shape[1] ** 0.5
    return float(pairs.mean()) if len(pairs) else 0.0


def alarms(found: SampleStatistics, teacher: SampleStatistics) -> list[str]:
    """One sentence for each statistic whose ratio to the teacher's is out of `LIMITS`."""
    sentences = []
    for name, (low, high) in LIMITS.items():
        mine, theirs = getattr(found, name), getattr(teacher, name)
        # grey pictures have no saturation, one picture no diversity, earlier versions' none of seeds
        if theirs <= 1e-3:
            continue
        ratio = mine / theirs
        if not low <= ratio <= high:
            sentences.append(
                f"{name.replace('_', ' ')} of the samples is {ratio:.2f} times the teacher's; {_MEANING[name]}"
            )
    return sentences
