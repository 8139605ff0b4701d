import dataclasses
import re

import pytest

from fewstep.diffusion.schedules import StepSchedule


def test_an_empty_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"generator.step_indices is empty: .*e.g. \[999\]"):
        StepSchedule(())


@pytest.mark.parametrize(
    ("indices", "num_levels", "wrong"),
    [((1000,), 1000, "[1000] lie outside 0..999"), ((5, -1), 1000, "[-1] lie"), ((99,), 50, "[99] lie outside 0..49")],
)
def test_indices_off_the_grid_are_named(indices: tuple[int, ...], num_levels: int, wrong: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"generator.step_indices {wrong}")):
        StepSchedule(indices, num_levels)


@pytest.mark.parametrize("indices", [(249, 999), (999, 999), (999, 249, 499)])
def test_rising_or_repeated_indices_are_refused(indices: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{list(indices)} must fall strictly, noisiest first")):
        StepSchedule(indices)


def test_ends_of_the_grid_are_allowed_and_indices_become_a_tuple_of_ints() -> None:
    steps = StepSchedule([999.0, 0])  # type: ignore[arg-type]
    assert steps.indices == (999, 0)
    assert all(type(index) is int for index in steps.indices)
    assert hash(steps) == hash(StepSchedule((999, 0)))


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        StepSchedule((999,)).indices = (1,)  # type: ignore[misc]
