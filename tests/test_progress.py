"""Long work is named before it is done, and says how far it is."""

import pytest
from rich.console import Console

from fewstep.progress import working


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_work_is_named_before_it_is_done(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where output is no terminal: a line at once, then one every few seconds."""
    clock = Clock()
    monkeypatch.setattr("fewstep.progress.time", clock)
    with working(Console(stderr=True), "Measuring") as report:
        assert capsys.readouterr().err == "Measuring ...\n"
        for done in range(0, 1200, 100):
            clock.now += 1.1
            report(done, 1100)
    assert capsys.readouterr().err == "Measuring: 400 of 1,100\nMeasuring: 900 of 1,100\n"
