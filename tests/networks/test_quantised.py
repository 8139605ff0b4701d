"""Weights in 8 and 4 bits: the error they may have, the size they take, and NF4's levels from the normal distribution."""

from itertools import pairwise
from statistics import NormalDist

import pytest
import torch

from fewstep.networks.quantised import BLOCK, NF4, Kind, dequantise, quantise

SHAPES = [(6, 64), (5, 7), (3, 4, 3, 3)]


def weights(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3e-5


def test_nf4_levels_are_quantiles_of_the_normal_distribution() -> None:
    """Source: arXiv:2305.14314, appendix E; the offset is the one of its published code."""
    normal, offset = NormalDist(), 0.9677083

    def quantiles(count: int) -> list[float]:
        return [normal.inv_cdf(offset + (0.5 - offset) * k / (count - 1)) for k in range(count - 1)]

    found = sorted([*quantiles(9), 0.0, *(-value for value in quantiles(8))])
    assert [value / found[-1] for value in found] == pytest.approx(list(NF4), abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_off_by_half_a_step_at_most(shape: tuple[int, ...]) -> None:
    weight = weights(shape)
    codes, scale = quantise(weight, "int8")
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
    found = dequantise(codes, scale, "int8", weight.shape, torch.float32)
    steps = scale.float().expand(-1, BLOCK).flatten()[: weight.numel()].view(shape)
    assert ((found - weight).abs() <= 0.5001 * steps * 1.01).all()  # 127.5 steps where the scale was rounded down
    assert (found - weight).norm() < 0.008 * weight.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_takes_the_nearest_level(shape: tuple[int, ...]) -> None:
    weight = weights(shape)
    codes, scale = quantise(weight, "nf4")
    assert (codes.dtype, codes.shape[1], scale.dtype) == (torch.uint8, BLOCK // 2, torch.bfloat16)
    found = dequantise(codes, scale, "nf4", weight.shape, torch.float32)
    scales = scale.float().expand(-1, BLOCK).flatten()[: weight.numel()].view(shape)
    levels = torch.tensor(NF4).view(-1, *[1] * weight.dim()) * scales
    assert ((found - weight).abs() <= (levels - weight).abs().amin(0) + 1e-12).all()
    widest = max(later - earlier for earlier, later in pairwise(NF4))
    assert ((found - weight).abs() <= 0.505 * widest * scales).all()


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8.25), ("nf4", 4.25)])
def test_bits_a_weight(kind: Kind, bits: float) -> None:
    weight = weights((32, 128))
    assert 8 * sum(part.nbytes for part in quantise(weight, kind)) / weight.numel() == bits


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_zeros_stay_zeros_and_every_type_has_the_same_weights(kind: Kind) -> None:
    """Weights of 3e-5 have scales that fp16 cannot hold."""
    weight = weights((4, 96))
    weight[1] = 0
    codes, scale = quantise(weight, kind)
    whole = dequantise(codes, scale, kind, weight.shape, torch.float32)
    assert not whole[1].any()
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)):
        found = dequantise(codes, scale, kind, weight.shape, dtype)
        assert found.dtype == dtype
        assert (found.double() - whole.double()).norm() <= tolerance * whole.double().norm()
