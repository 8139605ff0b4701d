"""Published prompt lists are read, and nothing a pickle asks for is done."""

import contextlib
import os
import pickle
import time
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.errors import UserError
from fewstep.formats.inert_pickle import read_pickled_strings

PROMPTS = ["a red cat", "", "ein Hündchen", "x" * 70_000, "two\nlines", "🐈"]


class Calls:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_pickled_strings(path)
    told = str(error.value)
    assert told.startswith(f"{path}: not a readable list of strings: ")
    assert "nothing in it was executed. Give a pickled list[str], or a text file" in told
    return told


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("prompts", [PROMPTS, [], ["one"], ["a", "b"] * 3000])
def test_a_list_of_strings(tmp_path: Path, protocol: int, prompts: list[str]) -> None:
    path = tmp_path / "prompts.pkl"
    path.write_bytes(pickle.dumps(prompts, protocol))
    assert read_pickled_strings(str(path)) == prompts


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (("a",), "it holds a tuple, not a list of strings"), ("a", "it holds a str, not"),
        ({"a": "b"}, "it holds a dict, not"), (["a", b"b"], "item 1 of its list is a bytes, not a string"),
        (["a", None], "item 1 of its list is a nonetype, not a string"), ([["a"]], "item 0 of its list is a list"),
        ([1], "item 0 of its list is a int"), (OrderedDict(), "asks for the global 'collections.OrderedDict'"),
        (np.array(["a"]), "asks for the global 'numpy"), ({"a"}, "it holds a set, not"),
    ],
)  # fmt: skip
def test_any_other_content(tmp_path: Path, content: Any, reason: str) -> None:
    assert reason in refused(tmp_path / "a.pkl", pickle.dumps(content))


@pytest.mark.parametrize("function", [os.system, eval, exec, open, __import__, list])
def test_functions_are_refused_and_not_called(tmp_path: Path, function: Any) -> None:
    canary = tmp_path / "canary"
    command = f"touch {canary}" if function is os.system else f"open({str(canary)!r}, 'w').close()"
    evil = Calls(function, command)
    for content in (evil, [evil], ["a", evil, "b"], {"a": evil}):
        assert "asks for the global" in refused(tmp_path / "evil.pkl", pickle.dumps(content))
    assert not canary.exists()
    if function in (os.system, eval):  # the same bytes do harm where they are unpickled
        pickle.loads(pickle.dumps(evil))
        assert canary.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"), (b"PK\x03\x04", "this is a zip archive"), (b"a red cat\n", "does not start like a pickle"),
        (pickle.dumps(["a"], 0), "protocol 2, 3, 4 or 5"), (pickle.dumps(["a"], 1), "protocol 2, 3, 4 or 5"),
        (b"\x80\x06].", "protocol 2, 3, 4 or 5"), (pickle.dumps(["a"] * 9)[:-3], ""), (b"\x80\x04.", "damaged"),
        (b"\x80\x04ios\nsystem\n.", "INST"), (b"\x80\x04P1\n.", "PERSID"),
        (pickle.dumps(["a"]) + pickle.dumps(["b"]), "it goes on after its first list"),
        (b"\x80\x04]\x94h\x00a.", "item 0 of its list is a list"),  # a list that holds itself
    ],
)  # fmt: skip
def test_damaged_and_foreign_files(tmp_path: Path, content: bytes, reason: str) -> None:
    assert reason in refused(tmp_path / "a.pkl", content)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pkl", tmp_path):
        with pytest.raises(UserError, match="no such file; check the path"):
            read_pickled_strings(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8d" + (2**60).to_bytes(8, "little") + b"abc",  # a string of 2^60 bytes
        b"\x80\x04]r" + (2**32 - 1).to_bytes(4, "little") + b"X",  # memo far away
        b"\x80\x04" + b"(" * 100_000, b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"].",
    ],
)  # fmt: skip
def test_memory_and_time_stay_bounded(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bomb.pkl"
    path.write_bytes(content)
    tracemalloc.start()
    started = time.perf_counter()
    with contextlib.suppress(UserError):
        read_pickled_strings(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 * len(content) + 2**20
    assert time.perf_counter() - started < 30
