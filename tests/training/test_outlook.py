"""What a time budget is worth is said while there is time to raise it."""

from fewstep.settings import PretrainSettings
from fewstep.training.outlook import ENOUGH_IMAGES, Outlook


def told(minutes: float, images_per_second: float, seconds: float = 30.0) -> list[str]:
    settings = PretrainSettings.model_validate({"training": {"time_limit_minutes": minutes, "batch_size": 10}})
    lines: list[str] = []
    outlook = Outlook(settings, 1000, lines.append)
    for part in (0.01, 1.0, 2.0):
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


def test_without_a_budget_nothing_is_said() -> None:
    assert told(minutes=0, images_per_second=60) == []
