"""How many samples at once fit a card: never too many, and all where all fit."""

import pytest

from fewstep.estimate.fits import describe_fits, largest_microbatch

GIB = 2**30


def peak(size: int) -> int:
    """The larger of two moments: one with much at rest, one that grows faster."""
    return max(10 * GIB + size * GIB // 4, 4 * GIB + size * GIB)


@pytest.mark.parametrize("limit", [4, 10.25, 11, 12, 20, 21.6, 40, 68, 100])
def test_what_is_promised_fits(limit: float) -> None:
    found = largest_microbatch(limit * GIB, peak(1), peak(64), 0, 64)
    assert 0 <= found <= 64
    assert found == 0 or peak(found) <= limit * GIB
    assert (found == 64) == (peak(64) <= limit * GIB)
    assert (found == 0) == (peak(1) > limit * GIB)


def test_nothing_is_lost_where_memory_grows_in_one_line() -> None:
    assert largest_microbatch(20 * GIB, 5 * GIB, 68 * GIB, 0, 64) == 16


def test_gradients_that_wait_are_room_taken() -> None:
    assert largest_microbatch(20 * GIB, 5 * GIB, 68 * GIB, 7 * GIB, 64) == 14


def test_the_line_names_every_card() -> None:
    asked: list[int] = []

    def rehearse(size: int) -> int:
        asked.append(size)
        return (22 + size) * GIB

    line = describe_fits(rehearse, 0, 30)
    assert line == (
        "training.microbatch_size that fits: none in 24 GiB, 14 in 40 GiB, 30 (the whole batch) in 80 GiB "
        "(a tenth of the card left free)"
    )
    assert asked == [30, 1]
    asked.clear()
    describe_fits(rehearse, 0, 1)
    assert asked == [1]
