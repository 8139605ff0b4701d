"""Long work is named before it is done, and says how far it is."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from fewstep import progress
from fewstep.progress import Stderr, be_quiet, busy, lines, say, working


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_work_is_named_before_it_is_done(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where output is no terminal: a line at once, then one every few seconds."""
    clock = Clock()
    monkeypatch.setattr("fewstep.progress.time", clock)
    report = lines(Console(stderr=True), "Measuring")
    assert capsys.readouterr().err == "Measuring ...\n"
    for done in range(0, 1200, 100):
        clock.now += 1.1
        report(done, 1100)
    assert capsys.readouterr().err == "Measuring: 400 of 1,100, 10 s left\nMeasuring: 900 of 1,100, 2 s left\n"


@pytest.mark.parametrize("named", [busy, working])
def test_only_work_that_takes_time_is_spoken_of(
    named: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.05)
    with named(Console(stderr=True), "Loading"):
        pass
    assert capsys.readouterr().err == ""
    with named(Console(stderr=True), "Loading"):
        time.sleep(0.2)
    assert capsys.readouterr().err == "Loading ...\n"


@pytest.mark.parametrize("named", [busy, working])
def test_work_that_does_not_end_says_that_it_goes_on(
    named: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.02)
    monkeypatch.setattr(progress, "STILL_EVERY_SECONDS", 0.05)
    with named(Console(stderr=True), "Downloading"):
        time.sleep(0.2)
    assert capsys.readouterr().err.startswith("Downloading ...\nDownloading: 0 s\n")


@pytest.fixture
def quiet() -> Iterator[None]:
    be_quiet(True)
    yield
    be_quiet(False)


@pytest.mark.usefixtures("quiet")
def test_quiet_leaves_warnings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.02)
    console = Stderr()
    with busy(console, "Loading"):
        time.sleep(0.1)
    lines(console, "Measuring")
    say(console, "a line")
    say(console, "warning: it is slow")
    assert capsys.readouterr().err == "warning: it is slow\n"


def test_an_error_inside_ends_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no"), busy(Console(stderr=True), "Loading"):
        raise ValueError("no")
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
