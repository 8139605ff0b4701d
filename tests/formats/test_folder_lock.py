"""One process holds a folder, and nothing of the lock stays behind."""

from pathlib import Path

import pytest

from fewstep.errors import UserError
from fewstep.formats import folder_lock
from fewstep.formats.folder_lock import LOCK, FolderLock, is_locked


def test_a_held_folder_is_refused_until_it_is_let_go(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "taken"):
        assert is_locked(tmp_path)
        with pytest.raises(UserError, match="taken"):
            FolderLock(tmp_path, "taken")
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_locks_nobody_out(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    assert not is_locked(tmp_path)
    with FolderLock(tmp_path, "taken"):
        pass


def test_a_lock_removed_between_opening_and_locking_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two processes would hold one folder: one the removed file, one the next."""
    fcntl = pytest.importorskip("fcntl")
    flock, calls = fcntl.flock, 0

    def late(file: object, how: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (tmp_path / LOCK).unlink()
        flock(file, how)

    monkeypatch.setattr(folder_lock.fcntl, "flock", late)
    with FolderLock(tmp_path, "taken"):
        assert calls == 2
        with pytest.raises(UserError, match="taken"):
            FolderLock(tmp_path, "taken")


def test_the_lock_of_a_folder_made_anew_stays(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    earlier = FolderLock(folder, "taken")
    folder.rename(tmp_path / "moved")
    folder.mkdir()
    with FolderLock(folder, "taken"):
        earlier.release()
        assert is_locked(folder)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*none/\.lock: .*; choose another folder"):
        FolderLock(tmp_path / "none", "taken")
