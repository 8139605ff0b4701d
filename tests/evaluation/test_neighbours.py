"""Precision, recall, density and coverage against their definitions, pair by pair in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.neighbours import neighbour_shares

NAMES = ("precision", "recall", "density", "coverage")


def figures(real: Tensor, generated: Tensor, manifold: int = 3, density: int = 5, block: int = 1024) -> list[float]:
    found = neighbour_shares(real, generated, manifold, density, block)
    return [float(found[name].mean()) for name in NAMES]


def by_brute_force(real: Tensor, generated: Tensor, manifold: int, density: int) -> list[float]:
    """Loops over pairs of points, as the definitions read."""
    real, generated = real.double(), generated.double()

    def far(a: Tensor, b: Tensor) -> float:
        return float(((a - b) ** 2).sum().sqrt())

    def radii(points: Tensor, k: int) -> list[float]:
        return [sorted(far(c, o) for j, o in enumerate(points) if j != i)[k - 1] for i, c in enumerate(points)]

    def balls(points: Tensor, centres: Tensor, k: int) -> list[list[bool]]:
        """Of every point, which balls around the centres it lies in."""
        reach = radii(centres, k)
        return [[far(p, c) <= radius for c, radius in zip(centres, reach, strict=True)] for p in points]

    def share(inside: list[list[bool]]) -> float:
        return sum(any(row) for row in inside) / len(inside)

    wide = balls(generated, real, density)
    return [
        share(balls(generated, real, manifold)), share(balls(real, generated, manifold)),
        sum(sum(row) for row in wide) / (density * len(generated)),
        sum(any(row[i] for row in wide) for i in range(len(real))) / len(real),
    ]  # fmt: skip


@pytest.mark.parametrize(("manifold", "density", "block"), [(1, 2, 1024), (3, 5, 1024), (3, 5, 7), (5, 1, 1)])
@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_agrees_with_brute_force(manifold: int, density: int, block: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(10)
    real = torch.randn(30, 4, generator=generator)
    generated = torch.randn(23, 4, generator=generator) * 0.6 + shift
    expected = by_brute_force(real, generated, manifold, density)
    assert figures(real, generated, manifold, density, block) == pytest.approx(expected)
    if shift == 1.0:
        assert all(value > 0 for value in expected)
        assert all(value < 1 for value in (*expected[:2], expected[3]))  # neither all nor nothing


def line(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def test_points_on_a_line() -> None:
    """Real 0..4 with k = 1 have radius 1; of the generated points 4.5 and 0.5 lie inside, 7 and 9 do not."""
    precision, recall, density, coverage = figures(line(0, 1, 2, 3, 4), line(0.5, 4.5, 7, 9), 1, 1)
    # radii of the generated: 4 (0.5 to 4.5), 2.5, 2, 2: reach -3.5..4.5, 2..7, 5..9, 7..11
    assert (precision, recall) == (0.5, 1.0)
    # 0.5 lies in the balls of 0 and 1, 4.5 in that of 4: three balls over four points; 0, 1 and 4 of five are covered
    assert (density, coverage) == (0.75, pytest.approx(0.6))


def test_mode_collapse_keeps_precision_and_density_and_loses_recall_and_coverage() -> None:
    real = line(*(10.0 * number for number in range(10)))
    generated = line(*(20.0 + 0.01 * number for number in range(6)))
    precision, recall, density, coverage = figures(real, generated, 3, 3)
    assert (precision, recall) == (1.0, pytest.approx(0.1))
    assert density > 1  # more balls than k: the paper's density has no upper end
    assert coverage <= 0.6


def test_an_outlier_among_the_real_raises_precision_and_not_density() -> None:
    """What density is for: the ball of one far real picture takes everything in, but is one ball of many."""
    generator = torch.Generator().manual_seed(3)
    real = torch.cat([torch.randn(50, 2, generator=generator) * 0.1, torch.tensor([[30.0, 0.0]])])
    generated = torch.randn(50, 2, generator=generator) * 0.1 + torch.tensor([5.0, 0.0])
    precision, _, density, _ = figures(real, generated, 3, 3)
    assert precision == 1.0
    assert density == pytest.approx(1 / 3)


def test_identical_and_distant_sets() -> None:
    points = torch.randn(20, 3, generator=torch.Generator().manual_seed(11))
    precision, recall, _, coverage = figures(points, points.clone())
    assert (precision, recall, coverage) == (1.0, 1.0, 1.0)
    assert figures(points, points + 100) == [0.0, 0.0, 0.0, 0.0]


def test_swapping_the_sets_swaps_precision_and_recall() -> None:
    generator = torch.Generator().manual_seed(12)
    a, b = torch.randn(40, 3, generator=generator), torch.randn(40, 3, generator=generator) * 0.5
    assert figures(a, b)[:2] == figures(b, a)[1::-1]


def test_a_point_on_the_border_is_inside() -> None:
    precision, _, density, coverage = figures(line(0, 1, 2), line(3, 13, 23), 1, 1)
    assert (precision, density, coverage) == pytest.approx((1 / 3, 1 / 3, 1 / 3))


@pytest.mark.parametrize(("real", "generated"), list(itertools.product([4, 5, 6], [4, 5, 6])))
def test_too_few_images(real: int, generated: int) -> None:
    sets = torch.randn(real, 2), torch.randn(generated, 2)
    if min(real, generated) > 5:
        neighbour_shares(*sets)
        return
    with pytest.raises(UserError, match=f"need more than 5 images, there are {min(real, generated)}$"):
        neighbour_shares(*sets)
