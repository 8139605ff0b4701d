"""The stock scheduler of an export runs the generator's own steps at the generator's own noise levels."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.diffusion.schedules import StepSchedule
from fewstep.errors import UserError
from fewstep.families.few_steps import build_flow_scheduler
from fewstep.families.registry import family_of, recognise
from fewstep.families.sd3.denoiser import SD3Denoiser
from tests.export.text_generators import FOLDERS
from tests.tiny_models import tiny_sd_folder


def load_diffusers_denoiser(folder: Path) -> Any:
    return recognise(folder).load(folder)


def build_few_step_scheduler(denoiser: Any, steps: StepSchedule) -> Any:
    return family_of(denoiser.describe()).few_step_scheduler(denoiser, steps)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    return {name: load_diffusers_denoiser(FOLDERS[name](folder / name)) for name in ("sd", "sd-v", "sd3")}


@pytest.mark.parametrize("name", ["sd", "sd-v"])
@pytest.mark.parametrize(
    ("steps", "grid"),
    [((999,), 1000), ((999, 499), 1000), ((999, 749, 499, 249), 1000), (tuple(range(999, 0, -125)), 1000), ((399,), 400), ((1,), 2), ((998, 665, 332), 1000),
     ((899, 599, 299), 900)],
)  # fmt: skip
def test_steps_and_levels_are_the_generators(
    networks: dict[str, Any], name: str, steps: tuple[int, ...], grid: int
) -> None:
    denoiser = networks[name]
    scheduler = build_few_step_scheduler(denoiser, StepSchedule(steps))
    again = type(scheduler).from_config(scheduler.config)
    again.set_timesteps(len(steps))
    assert again.timesteps.tolist() == list(steps)
    assert again.config.num_train_timesteps == grid
    assert again.config.prediction_type == denoiser.prediction
    levels = torch.tensor(steps)
    torch.testing.assert_close(
        again.alphas_cumprod[levels].double(), denoiser.noise_schedule.alpha64(levels) ** 2, rtol=0, atol=1e-7
    )
    again.set_timesteps(timesteps=list(steps))
    assert again.timesteps.tolist() == list(steps)
    c_skip, c_out = again.get_scalings_for_boundary_condition_discrete(levels[-1])
    assert c_skip < 1e-8
    assert c_out == 1


def test_more_steps_are_the_schedulers_own_error_and_fewer_are_trained_ones(networks: dict[str, Any]) -> None:
    steps = (999, 749, 499, 249)
    scheduler = build_few_step_scheduler(networks["sd"], StepSchedule(steps))
    for number in (5, 8, 25, 50, 1000):
        with pytest.raises(ValueError, match="is smaller than `num_inference_steps`"):
            scheduler.set_timesteps(number)
    for number in (1, 2, 3):
        scheduler.set_timesteps(number)
        assert set(scheduler.timesteps.tolist()) <= set(steps)
        assert scheduler.timesteps[0] == 999
    single = build_few_step_scheduler(networks["sd"], StepSchedule((399,)))
    with pytest.raises(ValueError, match="is smaller than `num_inference_steps`"):
        single.set_timesteps(2)


@pytest.mark.parametrize(
    ("steps", "nearest"),
    [
        ((999, 749), [999, 499]), ((999, 666, 333), [998, 665, 332]), ((0,), [1]), ((749, 499, 249, 0), [667, 500, 333, 166]),
        ((999, 899, 799, 699), [999, 749, 499, 249]), (tuple(range(999, 873, -18)), [993, 851, 709, 567, 425, 283, 141]),
    ],
)  # fmt: skip
def test_steps_that_cannot_travel_are_refused_with_the_nearest(
    networks: dict[str, Any], steps: tuple[int, ...], nearest: list[int]
) -> None:
    with pytest.raises(
        UserError, match=r"cannot travel in a diffusers scheduler: LCMScheduler runs n evenly spaced"
    ) as error:
        build_few_step_scheduler(networks["sd"], StepSchedule(steps))
    assert str(error.value).endswith(f": the nearest are generator.step_indices={nearest}")
    build_few_step_scheduler(networks["sd"], StepSchedule(tuple(nearest)))  # and they can


def test_more_steps_than_the_scheduler_has_room_for(networks: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"or train with such steps$"):
        build_few_step_scheduler(networks["sd"], StepSchedule(tuple(range(999, -1, -1))))


def test_a_schedule_with_zero_terminal_signal(tmp_path: Path) -> None:
    """Truncated or not, the rescaled betas are carried over."""
    folder = tiny_sd_folder(tmp_path / "sd", prediction_type="v_prediction")
    config = folder / "scheduler/scheduler_config.json"
    text = config.read_text().replace('"rescale_betas_zero_snr": false', '"rescale_betas_zero_snr": true')
    config.write_text(text)
    denoiser: Any = load_diffusers_denoiser(folder)
    assert not denoiser.noise_schedule.has_signal_everywhere
    for steps in ((999, 499), (399,)):
        scheduler = build_few_step_scheduler(denoiser, StepSchedule(steps))
        again = type(scheduler).from_config(scheduler.config)
        levels = torch.tensor(steps)
        torch.testing.assert_close(
            again.alphas_cumprod[levels].double(), denoiser.noise_schedule.alpha64(levels) ** 2, rtol=0, atol=1e-7
        )


@pytest.mark.parametrize(
    "steps", [(999,), (999, 499), (999, 749, 499, 249), (999, 749), (999, 899, 799), (999, 749, 699)]
)
@pytest.mark.parametrize("shift", [3.0, 1.0])
def test_flow_steps_and_levels_are_the_generators(
    networks: dict[str, Any], steps: tuple[int, ...], shift: float
) -> None:
    denoiser: Any = SD3Denoiser(networks["sd3"].network, {"shift": shift, "num_train_timesteps": 1000})
    assert denoiser.noise_schedule.shift == shift
    scheduler = build_few_step_scheduler(denoiser, StepSchedule(steps))
    again = type(scheduler).from_config(scheduler.config)
    again.set_timesteps(len(steps))
    wanted = denoiser.noise_schedule.grid[torch.tensor(steps)]
    torch.testing.assert_close(again.sigmas, torch.cat([wanted, torch.zeros(1)]), rtol=0, atol=1e-6)
    torch.testing.assert_close(again.timesteps, wanted * 1000, rtol=0, atol=1e-3)


def test_flow_schedulers_refuse_another_number_of_steps(networks: dict[str, Any]) -> None:
    scheduler = build_few_step_scheduler(networks["sd3"], StepSchedule((999, 749, 499, 249)))
    x = torch.zeros(1, 4, 8, 8)
    for number in (2, 3, 5, 28):
        scheduler.set_timesteps(number)
        with pytest.raises(ValueError, match="should have the same length"):
            scheduler.step(x, scheduler.timesteps[0], x)


@pytest.mark.parametrize(
    ("steps", "nearest"),
    [
        ((399,), [999]),
        ((998, 665, 332), [999, 665, 331]),
        ((999, 749, 699, 400), [999, 800, 601, 402]),
        ((900, 0), [999, 0]),
    ],
)
def test_flow_steps_that_cannot_travel_are_refused_with_the_nearest(
    networks: dict[str, Any], steps: tuple[int, ...], nearest: list[int]
) -> None:
    with pytest.raises(UserError, match=r"FlowMatchLCMScheduler runs evenly spaced steps that start at 999") as error:
        build_few_step_scheduler(networks["sd3"], StepSchedule(steps))
    assert str(error.value).endswith(f": the nearest are generator.step_indices={nearest}")
    build_few_step_scheduler(networks["sd3"], StepSchedule(tuple(nearest)))


def trained(sigmas: list[float]) -> StepSchedule:
    """Steps with levels of their own, whatever the grid says of their indices."""
    return StepSchedule(tuple(range(999, 999 - len(sigmas), -1)), sigmas=tuple(sigmas))


@pytest.mark.parametrize(
    "sigmas",
    [[1.0, 0.9, 0.75, 0.5], [1.0, 0.75], [1.0, 0.6, 0.55], [1.0, 0.95, 0.9, 0.85], [1.0], [0.9 - 0.8 * n / 7 + 0.1 for n in range(8)]],
)  # fmt: skip
def test_levels_travel_where_the_pipeline_gives_even_steps(networks: dict[str, Any], sigmas: list[float]) -> None:
    n = len(sigmas)
    even = [1 - number / n for number in range(n)]
    scheduler = build_flow_scheduler(networks["sd3"], trained(sigmas), even)
    again: Any = type(scheduler).from_config(scheduler.config)
    again.set_timesteps(sigmas=even, mu=1.3)  # of a dynamic shift, which is off
    torch.testing.assert_close(again.sigmas, torch.tensor([*sigmas, 0.0]), rtol=0, atol=1e-5)
    if n == 4 and sigmas[1] == 0.9:
        assert again.config.shift == pytest.approx(3)


def test_levels_on_no_such_curve_are_refused(networks: dict[str, Any]) -> None:
    for sigmas in ([1.0, 0.9, 0.5, 0.45], [0.9, 0.5], [0.9]):
        with pytest.raises(UserError, match="cannot travel in a diffusers scheduler"):
            build_flow_scheduler(networks["sd3"], trained(sigmas), [1 - n / len(sigmas) for n in range(len(sigmas))])
