"""A folder that is replaced is whole at every moment: the old one, or the new one."""

import os
import shutil
from pathlib import Path

import pytest

from fewstep.errors import UserError
from fewstep.formats import atomic
from fewstep.formats.atomic import remove_leftovers, replaced_file, standing, written_aside


class Killed(BaseException):
    """Stands for the moment after which a process does nothing more."""


def write(target: Path, text: str) -> None:
    with written_aside(target) as aside:
        (aside / "file").write_text(text)


def kill_in_call(monkeypatch: pytest.MonkeyPatch, module: object, name: str, number: int) -> None:
    """From the `number`-th call of a function on, nothing that changes the disk is done any more."""
    calls = 0
    original = getattr(module, name)

    def call(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls >= number:
            for dead in ("rename", "replace", "unlink"):
                monkeypatch.setattr(os, dead, lambda *_, **__: None)
            monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize(
    ("module", "name", "number", "text"),
    [(os, "rename", 1, "old"), (os, "rename", 2, "old"), (shutil, "rmtree", 2, "new")],
    ids=["before anything", "between the renames", "before the old one is removed"],
)
def test_a_kill_while_a_folder_is_replaced(
    tmp_path: Path, module: object, name: str, number: int, text: str
) -> None:  # fmt: skip
    target = tmp_path / "best"
    write(target, "old")
    with pytest.MonkeyPatch.context() as patch:
        kill_in_call(patch, module, name, number)
        with pytest.raises(Killed):
            write(target, "new")
    assert (standing(target) / "file").read_text() == text
    write(target, "newest")
    assert {path.name for path in tmp_path.iterdir()} == {"best"}
    assert (target / "file").read_text() == "newest"


def test_leftovers_are_tidied(tmp_path: Path) -> None:
    (tmp_path / ".best.replaced").mkdir()
    (tmp_path / ".best.replaced/file").write_text("old")
    (tmp_path / ".other.writing").mkdir()
    (tmp_path / ".settings.json.writing").write_text("{")
    (tmp_path / ".mine").write_text("kept")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"best", ".mine"}
    assert (tmp_path / "best/file").read_text() == "old"


def test_a_second_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "best"
    write(target, "old")
    original, calls = os.rename, []

    def rename(source: Path, aim: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError("disk error")
        original(source, aim)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(UserError, match=r"cannot write .*best: disk error; nothing was left half-written"):
        write(target, "new")
    assert (target / "file").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"best"}


def test_a_link_to_a_folder_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "old")
    (tmp_path / "best").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is not a folder of its own"):
        write(tmp_path / "best", "new")
    assert (tmp_path / "elsewhere/file").read_text() == "old"


def test_an_unwritable_place_is_one_sentence_even_when_tidying_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    monkeypatch.setattr(atomic.os, "replace", read_only)
    with pytest.raises(UserError, match="Read-only file system"), replaced_file(tmp_path / "file") as aside:
        aside.write_text("new")
