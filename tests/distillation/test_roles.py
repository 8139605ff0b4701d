"""Roles are built from a description and filled: equal to the teacher, sharing nothing with it."""

import pytest
import torch

from fewstep.diffusion.denoiser import Denoiser
from fewstep.distillation.roles import build_twin
from tests.conftest import tiny_denoiser
from tests.tiny_networks import FAMILIES, some_levels, tiny_condition, tiny_text_denoiser


def network_of(family: str) -> Denoiser:
    return tiny_denoiser() if family == "edm" else tiny_text_denoiser(family)


@pytest.mark.parametrize("family", ["edm", *FAMILIES])
def test_a_twin_is_equal_and_shares_no_memory(family: str) -> None:
    network = network_of(family).train()
    network.compute_dtype = torch.bfloat16
    random = torch.get_rng_state()
    twin = build_twin(network, "generator")
    assert torch.equal(torch.get_rng_state(), random), "a role must not draw from the state that others start from"
    assert type(twin) is type(network)
    assert twin.describe() == network.describe()
    assert (twin.training, twin.compute_dtype) == (True, torch.bfloat16)
    for name in ("image_shape", "feature_shapes", "num_classes"):
        assert getattr(twin, name) == getattr(network, name)
    mine, theirs = twin.state_dict(), network.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not {value.data_ptr() for value in mine.values()} & {value.data_ptr() for value in theirs.values()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_computes_the_same(family: str) -> None:
    network = tiny_text_denoiser(family).eval()
    twin = build_twin(network, "generator")
    noisy = torch.randn(2, *network.image_shape, generator=torch.Generator().manual_seed(0))
    inputs = (noisy, some_levels(network, 400, 10), tiny_condition(family))
    with torch.no_grad():
        assert torch.equal(twin.denoise(*inputs), network.denoise(*inputs))
