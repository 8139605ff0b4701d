"""The table of many processes takes its estimates from the batch's parts and the measured sum."""

import pytest

from benchmarks import processes
from benchmarks.processes import Figures, estimated, rate_of


@pytest.mark.long
def test_estimates_follow_from_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SIZE", "small")
    alone = Figures(0, [9.0], [2.0], 0.0)
    rate = rate_of("full", alone)
    whole, arithmetic, exchange = estimated("full", 1, alone, rate)
    assert (arithmetic, exchange) == (pytest.approx(2.0), 0.0)  # what was computed, not what elapsed
    half, one, sent = estimated("full", 2, Figures(0, [9.0], [2.0], 0.01), rate)
    _, _, slower = estimated("full", 2, Figures(0, [9.0], [2.0], 0.02), rate)
    assert one == pytest.approx(1.0)
    assert 0.4 * whole < half < whole
    assert slower == pytest.approx(2 * sent)
