"""The noise levels of a flow model's pipeline are those of diffusers' scheduler, at every resolution and number of steps."""

import importlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from fewstep.diffusion.flow_shift import read_flow_shift
from fewstep.diffusion.schedules import FlowSchedule, StepSchedule

CONFIGS: dict[str, dict[str, Any]] = {
    "static": {"shift": 3.0},
    "none": {},
    "by tokens": {"use_dynamic_shifting": True},
    "by tokens, other line": {
        "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192,
    },
    "terminal": {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
    "static terminal": {"shift": 3.0, "shift_terminal": 0.1},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
}  # fmt: skip


def their_sigmas(config: dict[str, Any], num_tokens: int, num_steps: int, module: str) -> torch.Tensor:
    """As the pipelines call the scheduler, mu by their own function."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**config)
    found = importlib.import_module(f"diffusers.pipelines.{module}")
    own = scheduler.config
    if hasattr(found, "compute_empirical_mu"):
        mu = found.compute_empirical_mu(num_tokens, num_steps)
    else:
        mu = found.calculate_shift(
            num_tokens, own.base_image_seq_len, own.max_image_seq_len, own.base_shift, own.max_shift
        )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
    return scheduler.sigmas


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_levels_are_the_schedulers(config: dict[str, Any], side: int) -> None:
    shift, tokens = read_flow_shift(config), (side // 2) ** 2
    for num_steps in (1, 2, 4, 28, 50):
        if num_steps == 1 and config.get("shift_terminal"):
            continue  # theirs divides 0 by 0
        theirs = their_sigmas(config, tokens, num_steps, "z_image.pipeline_z_image")
        ours = torch.tensor([*shift.sigmas(tokens, num_steps), 0.0])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-7)


@pytest.mark.parametrize("tokens", [16, 1024, 4096, 4301, 9000])
def test_a_rule_over_tokens_and_steps(tokens: int) -> None:
    module = "flux2.pipeline_flux2_klein"
    rule = importlib.import_module(f"diffusers.pipelines.{module}").compute_empirical_mu
    config = {"use_dynamic_shifting": True}
    shift = read_flow_shift(config, rule)
    for num_steps in (4, 10, 50):
        theirs = their_sigmas(config, tokens, num_steps, module)
        torch.testing.assert_close(
            torch.tensor([*shift.sigmas(tokens, num_steps), 0.0]), theirs, rtol=0, atol=2e-7
        )  # fmt: skip
        assert shift.schedule(tokens, num_steps).shift == pytest.approx(math.exp(rule(tokens, num_steps)))
    assert (shift.shift_of(tokens, 4) != shift.shift_of(tokens, 50)) == (tokens <= 4300)
    assert shift.max_tokens == 0


def test_the_grid_has_the_shift_and_no_terminal() -> None:
    shift = read_flow_shift({**CONFIGS["terminal"], "num_train_timesteps": 500})
    assert shift.schedule(4096, 50) == FlowSchedule(shift.shift_of(4096, 50), 500)
    assert shift.max_tokens == 8192
    assert shift.sigmas(4096, 1) == [1.0]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"shift": 0.0}, "shift=0 gives no noise schedule"), ({"shift": float("nan")}, "shift=nan gives"),
        ({"shift_terminal": 1.0}, "shift_terminal=1 does not lie"),
        ({"use_dynamic_shifting": True, "base_image_seq_len": 4096}, "base_image_seq_len=4096 is not below"),
    ],
)  # fmt: skip
def test_values_without_a_schedule_are_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_flow_shift(config)
    with pytest.raises(ValueError, match="num_steps=0"):
        read_flow_shift({}).sigmas(16, 0)


def test_a_generator_keeps_its_levels() -> None:
    """On another grid (a base whose scheduler was edited, another size) it runs where it was trained."""
    steps = StepSchedule.on(FlowSchedule(3.0), (999, 749, 499, 249))
    assert steps.sigmas == tuple(FlowSchedule(3.0).grid[[999, 749, 499, 249]].tolist())
    cpu = torch.device("cpu")
    for other in (FlowSchedule(3.0), FlowSchedule(6.0)):
        assert steps.level(other, 1, 2, cpu).tolist() == [steps.sigmas[1]] * 2
        assert torch.equal(steps.levels(other, cpu), torch.tensor(steps.sigmas))
    plain = StepSchedule((999, 749))
    assert torch.equal(plain.levels(FlowSchedule(6.0), cpu), FlowSchedule(6.0).grid[[999, 749]])


@pytest.mark.parametrize("sigmas", [(1.0,), (0.5, 1.0), (1.5, 0.5), (0.5, 0.0)])
def test_levels_that_are_none_are_refused(sigmas: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="the noise levels"):
        StepSchedule((999, 749), sigmas=sigmas)


@pytest.mark.parametrize("shift", [1.0, 1.75, 3.0, 6.0])
def test_travelling_levels_are_the_grids_own(shift: float) -> None:
    schedule = FlowSchedule(shift)
    indices = tuple(range(999, -1, -1))
    assert schedule.travelling(indices) == tuple(schedule.grid.flip(0).tolist())
