"""Precision, recall, density and coverage: how two sets of pictures lie in each other's balls of nearest neighbours."""

import torch
from torch import Tensor

from fewstep.errors import UserError

MANIFOLD_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5  # as the papers have them


def neighbour_shares(
    real: Tensor, generated: Tensor, manifold: int = MANIFOLD_NEIGHBOURS, density: int = DENSITY_NEIGHBOURS,
    block: int = 1024,
) -> dict[str, Tensor]:  # fmt: skip
    """Precision, recall, density and coverage picture by picture; the mean of each is the figure.

    With r_k(x) the distance of x to its k-th neighbour in its own set, x itself not counted:

        precision, per generated y: 1 where |y - x| <= r_3(x) for some real x
        recall, per real x: 1 where |x - y| <= r_3(y) for some generated y
        density, per generated y: the number of real x with |y - x| <= r_5(x), divided by 5
        coverage, per real x: 1 where |x - y| <= r_5(x) for some generated y

    Source: Kynkaanniemi et al. 2019 (arXiv:1904.06991) for the first two, k = 3; Naeem et al. 2020 (arXiv:2002.09797)
    for the others, k = 5.

    Args:
        real, generated: features, (N, F) and (M, F), each with more rows than neighbours.
        manifold, density: k of the first and of the second pair.
        block: rows compared at a time, which bounds the memory.

    Returns:
        `precision` and `density` (M,), `recall` and `coverage` (N,), float32; density may be above 1.

    Raises:
        UserError: a set has too few rows.
    """
    real, generated = real.float(), generated.float()
    most = max(manifold, density)
    if (fewest := min(len(real), len(generated))) <= most:
        raise UserError(f"precision, recall, density and coverage need more than {most} images, there are {fewest}")
    (reach, wide), (own, _) = (_radii(points, (manifold, density), block) for points in (real, generated))
    found = {name: generated.new_zeros(len(generated)) for name in ("precision", "density")}
    recall, coverage = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    for rows in torch.arange(len(generated)).split(block):
        distances = distances_between(generated[rows], real)
        inside = distances <= wide
        found["precision"][rows] = (distances <= reach).any(dim=1).float()
        found["density"][rows] = inside.sum(dim=1).float() / density
        coverage |= inside.any(dim=0)
        recall |= (distances <= own[rows, None]).any(dim=0)
    return {
        "precision": found["precision"], "recall": recall.float(), "density": found["density"],
        "coverage": coverage.float(),
    }  # fmt: skip


def _radii(points: Tensor, neighbours: tuple[int, ...], block: int) -> list[Tensor]:
    """Distance of every point to its k-th neighbour, (N,), for each k; the point itself is the nearest of all."""
    parts = [
        distances_between(rows, points).topk(max(neighbours) + 1, dim=1, largest=False).values
        for rows in points.split(block)
    ]
    nearest = torch.cat(parts)
    return [nearest[:, number] for number in neighbours]


def distances_between(a: Tensor, b: Tensor) -> Tensor:
    """Of every pair, without the rounding that products of large features would bring."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
