"""The published LMDB layouts: round trip, and every way a data set can be incomplete."""

import builtins
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch

from fewstep.errors import UserError
from fewstep.formats.lmdb import IMAGENET, LATENTS, ODE_PAIRS, LmdbArrays, array_names, read_array_shape
from tests.lmdb_files import write_lmdb


def arrays_of(kinds: dict[str, Any], count: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    values: dict[str, Any] = {}
    for name, kind in kinds.items():
        if kind is str:
            values[name] = [f"Bild {number} größer" for number in range(count)]
        elif kind == torch.uint8:
            values[name] = torch.randint(0, 256, (count, 3, 64, 64), generator=generator, dtype=kind)
        elif kind == torch.int64:
            values[name] = torch.randint(0, 1000, (count, 1), generator=generator)
        else:
            values[name] = torch.randn(count, 4, 8, 8, generator=generator).half()
    return values


def change(path: Path, key: str, value: bytes | None) -> None:
    with lmdb.open(str(path), lock=False, map_size=2**26) as env, env.begin(write=True) as transaction:
        if value is None:
            assert transaction.delete(key.encode())
        else:
            transaction.put(key.encode(), value)


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    write_lmdb(tmp_path / "set", arrays_of(LATENTS))
    return tmp_path / "set"


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        LmdbArrays(path, LATENTS)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kinds", [IMAGENET, LATENTS, ODE_PAIRS])
def test_round_trip(tmp_path: Path, kinds: dict[str, Any]) -> None:
    values = arrays_of(kinds)
    write_lmdb(tmp_path / "set", values)
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["data.mdb"]
    index = torch.tensor([4, 0, 0, 2])
    with LmdbArrays(tmp_path / "set", kinds) as data:
        for name, value in values.items():
            if kinds[name] is str:
                assert data.texts(name, index) == [value[i] for i in index.tolist()]
            else:
                assert data.shapes[name] == tuple(value.shape)
                assert data.rows(name, index).dtype == kinds[name]
                assert torch.equal(data.rows(name, index.tolist()), value[index])
                assert data.rows(name, []).shape == (0, *value.shape[1:])


def test_the_layout_is_the_published_one(latents: Path) -> None:
    values = arrays_of(LATENTS)
    with lmdb.open(str(latents), readonly=True, lock=False) as env, env.begin() as transaction:
        assert transaction.get(b"latents_shape") == b"5 4 8 8"
        assert transaction.get(b"latents_3_data") == values["latents"][3].numpy().tobytes()
        assert transaction.get(b"prompts_shape") == b"5"
        assert transaction.get(b"prompts_4_data") == values["prompts"][4].encode()


def test_two_readers_share_one_file(latents: Path) -> None:
    """lmdb opens a file once a process; whoever closes first leaves it open for the other."""
    first = LmdbArrays(latents, LATENTS)
    with LmdbArrays(latents / "..//set", LATENTS) as second:
        assert torch.equal(first.rows("latents", [1]), second.rows("latents", [1]))
    assert len(first.texts("prompts", [1])) == 1
    first.close()
    with pytest.raises(ValueError, match="is closed"):
        first.rows("latents", [1])
    with lmdb.open(str(latents), readonly=True, lock=False) as env:  # nobody has it open now
        assert array_names(env) == ["latents", "prompts"]


def test_a_single_file_and_the_names_in_it(tmp_path: Path, latents: Path) -> None:
    path = tmp_path / "one.mdb"
    (latents / "data.mdb").rename(path)
    with LmdbArrays(path, LATENTS) as data:
        assert len(data.texts("prompts", [1])) == 1
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env:
        assert array_names(env) == ["latents", "prompts"]
        assert read_array_shape(env, "latents") == (5, 4, 8, 8)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("latents_3_data", None, "latents_3_data is missing of 5 rows; the data set is incomplete or damaged: download"),
        ("prompts_0_data", None, "prompts_0_data is missing of 5 rows"),
        ("latents_1_data", b"short", "latents_1_data has 5 bytes, a row of shape (4, 8, 8) and float16 has 512;"),
        ("latents_4_data", bytes(513), "latents_4_data has 513 bytes"),
        ("latents_shape", None, "the key latents_shape is missing (arrays there: prompts); it is another kind"),
        ("latents_shape", b"6 4 8 8", "latents_5_data is missing of 6 rows"),
        ("latents_shape", b"five", "latents_shape is b'five', not numbers separated by spaces"),
        ("latents_shape", b"", "not numbers separated by spaces"),
        ("latents_shape", b"-1 4", "not numbers separated by spaces"),
        ("prompts_shape", b"5 1", "prompts_shape is (5, 1), for text it has one number"),
    ],
)  # fmt: skip
def test_incomplete_data(latents: Path, key: str, value: bytes | None, told: str) -> None:
    change(latents, key, value)
    assert told in refused(latents)
    refused(latents)  # the first failure closed the files: the second is the same


def test_text_that_is_none(latents: Path) -> None:
    change(latents, "prompts_2_data", b"\xff")
    with LmdbArrays(latents, LATENTS) as data, pytest.raises(UserError, match="prompts_2_data is not UTF-8 text"):
        data.texts("prompts", [1, 2])


def test_wrong_questions(latents: Path) -> None:
    with LmdbArrays(latents, LATENTS) as data:
        for index in (5, -1):
            with pytest.raises(IndexError):
                data.rows("latents", [index])
        with pytest.raises(ValueError, match="no opened array of numbers"):
            data.rows("prompts", [0])
        with pytest.raises(ValueError, match="no opened array of text"):
            data.texts("latents", [0])
        with pytest.raises(ValueError, match="no opened array"):
            data.rows("images", [0])


def test_no_lmdb_there(tmp_path: Path) -> None:
    assert "holds no LMDB: give the folder with data.mdb, or the file" in refused(tmp_path)
    (tmp_path / "data.mdb").write_bytes(b"something else" * 1000)
    assert "cannot be opened as LMDB" in refused(tmp_path)


def test_cut_short(latents: Path) -> None:
    path = latents / "data.mdb"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size // 2)
    assert f"is cut short: {size // 2} bytes of" in refused(latents)


def test_without_the_package(latents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "lmdb":
            raise ImportError
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"need the lmdb package: pip install lmdb"):
        LmdbArrays(latents, LATENTS)
