from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser, DenoiserOutput, Want, guided_denoise
from fewstep.diffusion.per_sample import per_sample
from fewstep.diffusion.schedules import DiscreteSchedule, FlowSchedule, KarrasSchedule
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.families.prediction import Prediction, predicted_x0
from tests.conftest import tiny_denoiser


class RecordingDenoiser(Denoiser):
    """An x0 estimate that depends on every input row, and a record of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.noise_schedule = KarrasSchedule()
        self.calls: list[tuple[Tensor, Tensor, Condition, Want]] = []

    def forward(self, noisy: Tensor, level: Tensor, condition: Condition, want: Want = "x0") -> DenoiserOutput:
        self.calls.append((noisy, level, condition, want))
        bias = level if "class_labels" not in condition else level + condition["class_labels"] @ torch.arange(1.0, 5)
        return DenoiserOutput(noisy + per_sample(bias, noisy), None)


def inputs() -> tuple[Tensor, Tensor, Condition]:
    torch.manual_seed(0)
    return torch.randn(3, 1, 2, 2), torch.tensor([0.5, 2, 8]), Condition.from_labels(torch.tensor([0, 3, 1]), 4)


def test_scale_one_is_a_single_forward_of_the_batch_itself() -> None:
    denoiser, (noisy, level, condition) = RecordingDenoiser(), inputs()
    x0 = guided_denoise(denoiser, noisy, level, condition, 1.0)
    ((seen_noisy, seen_level, seen_condition, want),) = denoiser.calls
    assert seen_noisy is noisy
    assert seen_level is level
    assert seen_condition is condition
    assert want == "x0"
    assert torch.equal(x0, denoiser.denoise(noisy, level, condition))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.75, 8.0])
def test_any_other_scale_is_one_forward_of_both_branches(scale: float) -> None:
    denoiser, (noisy, level, condition) = RecordingDenoiser(), inputs()
    guided_denoise(denoiser, noisy, level, condition, scale)
    ((seen_noisy, seen_level, seen_condition, want),) = denoiser.calls
    assert want == "x0"
    assert len(seen_noisy) == len(seen_level) == len(seen_condition) == 6
    assert torch.equal(seen_noisy[:3], noisy)
    assert torch.equal(seen_noisy[3:], noisy)
    assert seen_level.tolist() == [0.5, 2, 8, 0.5, 2, 8]
    labels = seen_condition["class_labels"]
    zero_rows = [row for row in range(6) if not labels[row].any()]
    assert len(zero_rows) == 3
    assert torch.equal(labels[[row for row in range(6) if row not in zero_rows]], condition["class_labels"])


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.75, 8.0])
def test_value_is_uncond_plus_scaled_difference(scale: float) -> None:
    noisy, level, condition = inputs()
    x0 = guided_denoise(RecordingDenoiser(), noisy, level, condition, scale)
    unconditional = noisy + level[:, None, None, None]
    expected = unconditional + scale * torch.tensor([1.0, 4, 2])[:, None, None, None]
    torch.testing.assert_close(x0, expected)


def test_a_real_network_follows_the_same_formula() -> None:
    denoiser = tiny_denoiser().double()
    noisy, level = torch.randn(4, 1, 16, 16, dtype=torch.float64), torch.tensor([0.1, 1, 5, 80]).double()
    with torch.no_grad():
        zeros = denoiser.denoise(noisy, level, Condition.from_one_hot(torch.zeros(4, 4).double()))
        given = denoiser.denoise(noisy, level, Condition.from_one_hot(torch.eye(4).double()))
        guided = guided_denoise(denoiser, noisy, level, Condition.from_one_hot(torch.eye(4).double()), 2.5)
    assert (given - zeros).abs().max() > 1e-3
    torch.testing.assert_close(guided, 2.5 * given - 1.5 * zeros, rtol=1e-9, atol=1e-10)


def test_gradient_reaches_the_input_through_both_branches() -> None:
    noisy, level, condition = inputs()
    noisy.requires_grad_(True)
    guided_denoise(RecordingDenoiser(), noisy, level, condition, 3.0).sum().backward()
    torch.testing.assert_close(noisy.grad, torch.ones_like(noisy))


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 2), (2, 3, 2, 2)], ids=["2 axes", "3 axes", "4 axes", "5 axes"])
def test_any_number_of_axes(shape: tuple[int, ...]) -> None:
    """Every sample has a level and a label of its own; none may reach a neighbour."""
    _, level, condition = inputs()
    noisy = torch.randn(3, *shape)
    x0 = guided_denoise(RecordingDenoiser(), noisy, level, condition, 2.0)
    for row, label in enumerate((1.0, 4.0, 2.0)):
        torch.testing.assert_close(x0[row], noisy[row] + level[row] + 2 * label)


@pytest.mark.parametrize("prediction", ["flow", "epsilon", "v_prediction"])
@pytest.mark.parametrize("cap", [0.0, 0.5, 1.0, 100.0])
def test_the_norm_of_what_the_network_predicts_is_capped(prediction: Prediction, cap: float) -> None:
    """Recomputed on raw predictions in float64: what guidance made longer than cap times the conditional one is scaled down."""
    torch.manual_seed(0)
    network = torch.nn.Linear(1, 1)
    schedule: Any = FlowSchedule(3.0) if prediction == "flow" else DiscreteSchedule(torch.linspace(0.99, 0.01, 1000))
    denoiser = DiffusersDenoiser(network, {}, schedule, prediction, (4, 2, 2))
    denoiser.guidance_norm_cap = cap
    level = schedule.at(torch.tensor([10, 400, 900]))
    noisy, raws = torch.randn(3, 4, 2, 2).double(), torch.randn(2, 3, 4, 2, 2).double()
    raws[1, 0] = raws[0, 0] + 0.01 * raws[1, 0]
    alpha, sigma = (per_sample(part(level).double(), noisy) for part in (schedule.alpha, schedule.sigma))
    uncond, cond = (predicted_x0(prediction, raw, noisy, alpha, sigma) for raw in raws)
    raw = raws[0] + 5 * (raws[1] - raws[0])
    if cap:
        ratio = cap * raws[1].flatten(1).norm(dim=1) / raw.flatten(1).norm(dim=1)
        raw = raw * per_sample(ratio.clamp(max=1), raw)
    expected = predicted_x0(prediction, raw, noisy, alpha, sigma)
    found = denoiser.guide(uncond, cond, noisy, level, 5.0)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-6
    plain = uncond + 5 * (cond - uncond)
    assert bool(((found - plain).flatten(1).norm(dim=1) > 1e-3)[1:].all()) == (cap in (0.5, 1.0))
