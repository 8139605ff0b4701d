"""Processes that torchrun restarts find each other, though its store still has what the dead ones said."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from fewstep import parallel
from fewstep.errors import UserError
from fewstep.parallel import _attempt, _lost

WAITS = timedelta(seconds=5)


def names(store: dist.Store, order: list[int]) -> list[str]:
    """The name that each of the processes has for the start, which come in an order."""
    with ThreadPoolExecutor() as pool:
        found = [pool.submit(_attempt, store, number, len(order), WAITS) for number in order]
        return [one.result() for one in found]


def test_each_start_has_a_name_of_its_own_that_all_have() -> None:
    store = dist.HashStore()
    seen = set()
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):  # the words of the starts before lie there
        first, *others = names(store, order)
        assert others == [first, first]
        seen.add(first)
    assert len(seen) == 3


def test_a_word_of_the_dead_is_no_answer() -> None:
    """The first process of the start before said go, and the second one had answered; neither is there now."""
    store = dist.HashStore()
    store.set("hello 1", "old")
    store.set("go", json.dumps(["dead", "old"]))
    store.set("dead 1", "here")
    with pytest.raises(UserError, match="process 0 waited 0 s in vain for process 1 to start"):
        _attempt(store, 0, 2, timedelta(seconds=0.2))
    with pytest.raises(UserError, match="process 1 waited 0 s in vain for process 0 to start"):
        _attempt(store, 1, 2, timedelta(seconds=0.2))


def test_a_lost_process_is_told_in_one_line_and_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three the last one noticed, too."""
    store, more = dist.HashStore(), ". This is typically caused by a remote worker crashing. GLHF!\nmore"
    error = RuntimeError(f"[/somewhere/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:5{more}")
    assert _lost(error, store) == (
        "the processes lost each other (Connection closed by peer [127.0.0.1]:5); repeat the command, or let torchrun "
        "--max-restarts do it"
    )
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    monkeypatch.setattr(parallel, "_FIRST_SPEAKS_SECONDS", 0.1)
    store.set("noticed 2", "")
    timed_out = RuntimeError("Timed out waiting 12000ms for send operation to complete")
    assert "lost each other (process 1 does not answer: Timed out waiting 12000ms for" in _lost(timed_out, store)
    with pytest.raises(RuntimeError, match="shapes"):
        _lost(RuntimeError("shapes do not fit"), store)
