"""What a time budget is worth is said while there is time to raise it."""

from fewstep.settings import PretrainSettings, TrainSettings
from fewstep.training.outlook import ENOUGH_IMAGES, Outlook


def told(minutes: float, images_per_second: float, seconds: float = 30.0, num_steps: int = 100_000_000) -> list[str]:
    settings = PretrainSettings.model_validate(
        {"training": {"time_limit_minutes": minutes, "batch_size": 10, "num_steps": num_steps}}
    )
    lines: list[str] = []
    outlook = Outlook(settings, 1000, lines.append)
    for part in (0.1, 1.0, 2.0):
        outlook(round(images_per_second * seconds * part / 10), seconds * part)
    return lines


def test_a_budget_that_is_enough_is_said_once() -> None:
    (line,) = told(minutes=20, images_per_second=500)
    assert line == (
        "at 500 images/s the 20 minutes are about 60,000 steps: 600,000 pictures seen, each of the 1,000 about 600 times"
    )


def test_a_budget_that_is_too_small_is_a_warning_with_one_that_is_not() -> None:
    (line,) = told(minutes=20, images_per_second=60)
    assert line.startswith("warning: at 60 images/s the 20 minutes are about 7,200 steps: 72,000 pictures seen")
    assert "expect blurs below 500,000 (training.time_limit_minutes=140 here)" in line
    assert ENOUGH_IMAGES <= 140 * 60 * 60


def test_without_a_budget_the_steps_take_their_time() -> None:
    (line,) = told(minutes=0, images_per_second=60, num_steps=20_000)
    assert line == "at 60 images/s the 19,820 steps left take about 55 min"
    assert told(minutes=600, images_per_second=60, num_steps=20_000) == [line]  # they end before the clock does


def test_a_student_has_no_number_that_is_enough() -> None:
    settings = TrainSettings.model_validate(
        {"training": {"time_limit_minutes": 10, "batch_size": 48, "num_steps": 1_000_000}, "data": {"images": "x"}}
    )
    lines: list[str] = []
    outlook = Outlook(settings, 0, lines.append)
    for step in range(1, 60):
        outlook(step, float(step))
    assert lines == ["at 48 images/s the 10 minutes are about 600 steps: 28,800 pictures"]


def test_the_first_step_which_warms_up_does_not_count() -> None:
    settings = PretrainSettings.model_validate({"training": {"time_limit_minutes": 1, "batch_size": 10}})
    lines: list[str] = []
    outlook = Outlook(settings, 1000, lines.append)
    for step in range(1, 9):
        outlook(step, 20.0 + step)
    assert lines[0].startswith("warning: at 10 images/s the 1 minutes are about 40 steps: 400 pictures seen")
