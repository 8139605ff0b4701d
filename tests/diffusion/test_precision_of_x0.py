"""An x0 estimate that is asked for in float64 is the float32 one before its rounding: the network sees the same."""

import pytest
import torch

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser
from tests.conftest import relative_error, tiny_denoiser
from tests.tiny_networks import tiny_condition, tiny_text_denoiser


def case(family: str) -> tuple[Denoiser, Condition]:
    if family == "edm":
        return tiny_denoiser(), Condition.from_labels(torch.tensor([1, 3]), 4)
    return tiny_text_denoiser(family).eval(), tiny_condition(family)


@pytest.mark.parametrize("family", ["edm", "sd", "sdxl", "sd3"])
@pytest.mark.parametrize("index", [5, 500, 980])
def test_float64_in_float64_out(family: str, index: int) -> None:
    denoiser, condition = case(family)
    level = denoiser.noise_schedule.expanded(index, 2, torch.device("cpu"))
    noisy = torch.randn(2, *denoiser.image_shape, generator=torch.Generator().manual_seed(0)) * (
        1 + level.max().item() % 80
    )
    seen = list[torch.Tensor]()
    network = (
        denoiser.model if family == "edm" else next(m for m in denoiser.modules() if isinstance(m, torch.nn.Conv2d))
    )
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        narrow = denoiser.denoise(noisy, level, condition)
        wide = denoiser.denoise(noisy.double(), level, condition)
        feature = denoiser.features(noisy.double(), level, condition)[0]
    assert torch.equal(seen[0], seen[1])
    assert seen[1].dtype == feature.dtype == narrow.dtype == torch.float32
    assert wide.dtype == torch.float64
    assert not torch.equal(wide, wide.float().double())  # there is something below float32
    assert relative_error(narrow, wide) < 1e-6
