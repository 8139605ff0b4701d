"""What lies on object storage is copied whole, once, and refused in one sentence where that cannot be; fsspec's memory is the storage."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from fewstep.data.captioned_images import open_captioned_images
from fewstep.data.prompts import load_prompts
from fewstep.errors import UserError
from fewstep.formats import remote
from fewstep.formats.remote import data_path, is_url, local_copy, refuse_url
from tests.data.test_captioned_images import write_folder


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty memory file system, whose copies go below the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    local_copy.cache_clear()
    yield memory
    memory.store.clear()
    local_copy.cache_clear()


@pytest.fixture
def fetched(storage: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are copied, as they are."""
    names: list[str] = []
    original = type(storage).get_file

    def get_file(self: Any, name: str, target: str, **more: Any) -> None:
        names.append(name)
        original(self, name, target, **more)

    monkeypatch.setattr(type(storage), "get_file", get_file)
    return names


def again(url: str) -> Path:
    """As another process would ask."""
    local_copy.cache_clear()
    return local_copy(url)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_copied_once_and_follows_its_source(storage: Any, fetched: list[str]) -> None:
    storage.pipe({"/set/a.txt": b"one", "/set/deep/b.txt": b"two", "/set2/c.txt": b"another set"})
    folder = local_copy("memory://set")
    assert contents(folder) == {"a.txt": b"one", "deep/b.txt": b"two"}
    assert again("memory://set") == folder
    assert sorted(fetched) == ["/set/a.txt", "/set/deep/b.txt"]
    storage.pipe({"/set/a.txt": b"changed", "/set/d.txt": b"new"})
    storage.rm("/set/deep/b.txt")
    assert contents(folder) == {"a.txt": b"one", "deep/b.txt": b"two"}  # of this process
    assert contents(again("memory://set")) == {"a.txt": b"changed", "d.txt": b"new"}
    assert sorted(fetched[2:]) == ["/set/a.txt", "/set/d.txt"]
    (folder / "d.txt").unlink()
    assert contents(again("memory://set")) == {"a.txt": b"changed", "d.txt": b"new"}


def test_an_interrupted_copy_goes_on(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.pipe({f"/set/{number}": bytes(number + 1) for number in range(6)})
    original, broken, asked = type(storage).get_file, ["/set/3"], []

    def get_file(self: Any, name: str, target: str, **more: Any) -> None:
        asked.append(name)
        if name in broken:
            Path(target).write_bytes(b"half")
            raise ConnectionError("reset by peer")
        original(self, name, target, **more)

    monkeypatch.setattr(type(storage), "get_file", get_file)
    monkeypatch.setattr(remote, "_THREADS", 1)
    with pytest.raises(UserError, match=r"memory://set: /set/3 cannot be read \(reset by peer\)"):
        local_copy("memory://set")
    broken.clear()
    assert len(contents(again("memory://set"))) == 6
    assert [asked.count(f"/set/{number}") for number in range(4)] == [1, 1, 1, 2]


def test_what_cannot_be_copied_is_refused(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(url: str) -> str:
        with pytest.raises(UserError) as error:
            data_path(url)
        return str(error.value)

    assert refused("memory://nothing") == "memory://nothing: nothing is there"
    assert refused("nosuch://bucket/set").startswith("nosuch://bucket/set cannot be opened (Protocol not known: nosuch")
    storage.pipe("/set/a.txt", b"one")
    with monkeypatch.context() as patch:
        patch.setattr(remote.shutil, "disk_usage", lambda path: SimpleNamespace(free=2))
        assert "3e-09 GB are to be copied to" in refused("memory://set")
    with monkeypatch.context() as patch:
        patch.setattr(type(storage), "get_file", lambda self, name, target, **more: Path(target).write_bytes(b"o"))
        assert refused("memory://set") == "memory://set: /set/a.txt came with 1 of 3 bytes; repeat the command"

    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    assert refused("s3://bucket/set").endswith(
        "what reads s3:// is not installed; pip install s3fs (the extra s3 of ours)"
    )
    assert refused("oss://bucket/set").endswith("what reads oss:// is not installed; Install s3fs to access S3")


def test_paths_are_no_urls() -> None:
    assert not any(is_url(text) for text in ("runs/a", "C://a", "bundled:emoji", "org/name", "~/x", ""))
    assert is_url("s3://bucket/a")
    for place in ("s3://bucket/a", Path("s3://bucket/a")):
        with pytest.raises(UserError, match=r"folder=s3:/+bucket/a: prepare writes on a disk; name a folder there"):
            refuse_url(place, "folder")
    refuse_url("C:/a", "folder")
    assert (data_path("."), data_path("")) == (Path(), Path())


def test_readers_take_urls(storage: Any, tmp_path: Path) -> None:
    """One file, and a folder of captioned pictures."""
    storage.pipe("/lists/prompts.txt", b"a cat\na dog\n")
    assert load_prompts("memory://lists/prompts.txt") == ["a cat", "a dog"]
    storage.put(str(write_folder(tmp_path / "pictures", ["red", "blue"])), "/captioned", recursive=True)
    rows = list(open_captioned_images("memory://captioned").rows(0))
    assert [row.caption for row in rows] == ["red", "blue"]
