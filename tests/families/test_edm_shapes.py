"""The shape of an EDM network is read from its weights alone."""

from dataclasses import replace

import pytest
import torch

from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.families.edm.shape_from_weights import edm_config_from_weights
from fewstep.families.registry import build_released
from tests.conftest import golden_denoiser

RELEASED = ("imagenet64-adm", "cifar10-ddpmpp", "cifar10-ncsnpp", "ffhq64-ddpmpp", "ffhq64-ncsnpp")


@pytest.mark.parametrize("name", RELEASED)
def test_released_networks(name: str) -> None:
    """Dropout leaves no trace, and distillation has none. Filters are constants that a file may leave out."""
    denoiser = build_released(name)
    assert isinstance(denoiser, EDMDenoiser)
    weights = {key: value for key, value in denoiser.state_dict().items() if not key.endswith("resample_filter")}
    assert edm_config_from_weights(weights) == replace(denoiser.config, dropout=0.0)


@pytest.mark.parametrize("family", ["adm", "ddpmpp", "ncsnpp"])
def test_golden_networks(family: str) -> None:
    denoiser, _ = golden_denoiser(family)
    assert edm_config_from_weights(denoiser.state_dict()) == replace(denoiser.config, dropout=0.0)


def test_a_filter_is_read_from_its_buffer() -> None:
    denoiser, _ = golden_denoiser("ddpmpp")
    weights = denoiser.state_dict()
    line = torch.tensor([1.0, 2.0, 1.0])
    for name in weights:
        if name.endswith("resample_filter"):
            weights[name] = (torch.outer(line, line) / 16)[None, None]
    assert edm_config_from_weights(weights).resample_filter == (1, 2, 1)
    for name in weights:
        if name.endswith("resample_filter"):
            weights[name] = torch.tensor([[[[1.0, -1.0], [1.0, 1.0]]]])
    with pytest.raises(ValueError, match="is no resampling filter"):
        edm_config_from_weights(weights)


def test_other_weights_are_refused() -> None:
    for weights in ({}, {"model.map_layer0.weight": torch.ones(2, 2)}, {"model.enc.8x8_conv.weight": torch.ones(1)}):
        with pytest.raises(ValueError, match="no EDM network this library knows"):
            edm_config_from_weights(weights)
