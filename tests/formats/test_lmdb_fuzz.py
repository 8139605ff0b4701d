"""Damaged LMDB files, in a process of their own, because the library maps them and is written in C."""

import subprocess
import sys
from pathlib import Path

import lmdb
import pytest
import torch

from fewstep.errors import UserError
from fewstep.formats.lmdb import LATENTS, LmdbArrays, array_names
from fewstep.formats.lmdb_pages import check_lmdb_file
from tests.lmdb_files import write_lmdb
from tests.mutations import assert_read_or_refused, byte, cut_or_grown, lmdb_field, lmdb_pages, lmdb_values

ROWS = 60


def read_everything(path: Path) -> int:
    """Every row of a published layout, and the names of the arrays."""
    with LmdbArrays(path, LATENTS) as data:
        array_names(data._env)
        num_bytes = data.rows("latents", range(data.shapes["latents"][0])).nbytes
        return num_bytes + sum(map(len, data.texts("prompts", range(data.shapes["prompts"][0]))))


def valid_folder(folder: Path) -> Path:
    """Branch and leaf pages, and values on pages of their own."""
    prompts = [f"prompt {number} " * (900 if number % 20 == 7 else 3) for number in range(ROWS)]
    write_lmdb(folder, {"latents": torch.randn(ROWS, 4, 4, 4).half(), "prompts": prompts})
    return folder


def fuzz(folder: Path) -> None:
    valid = (valid_folder(folder / "valid") / "data.mdb").read_bytes()
    read_everything(folder / "valid")
    mutations = (byte, cut_or_grown, lmdb_field, lmdb_field, lmdb_field, lmdb_pages, lmdb_values, lmdb_values)
    assert_read_or_refused(folder, "data.mdb", valid, mutations, read_everything)


@pytest.mark.slow
def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from tests.formats.test_lmdb_fuzz import fuzz; fuzz(Path({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    last = max((int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()), default=-1)
    assert done.returncode == 0, f"file {last}: {done.stderr[-2000:]}"


@pytest.mark.parametrize(("rows", "size"), [(1, 8), (40, 8), (3, 20_000), (5000, 8), (700, 900)])
def test_sound_files_pass(tmp_path: Path, rows: int, size: int) -> None:
    """Empty, one leaf, several levels, values on many pages, deleted rows, an older state before the newest."""
    with lmdb.open(str(tmp_path), map_size=2**26, lock=False) as env:
        check_lmdb_file(tmp_path / "data.mdb")
        for start in (0, rows // 2):
            with env.begin(write=True) as transaction:
                for number in range(start, rows):
                    transaction.put(f"a_{number}_data".encode(), bytes(size))
            check_lmdb_file(tmp_path / "data.mdb")
        with env.begin(write=True) as transaction:
            for number in range(0, rows, 3):
                transaction.delete(f"a_{number}_data".encode())
    check_lmdb_file(tmp_path / "data.mdb")


def test_files_with_several_values_a_key_are_refused(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), max_dbs=2, lock=False) as env:
        database = env.open_db(b"inner", dupsort=True)
        with env.begin(write=True) as transaction:
            transaction.put(b"a", b"1", db=database)
    check_lmdb_file(tmp_path / "data.mdb")  # the inner one is a value like others
    with pytest.raises(UserError, match="the key latents_shape is missing"):
        LmdbArrays(tmp_path, LATENTS)


def test_a_name_and_keys_that_are_out_of_order(tmp_path: Path) -> None:
    """Names of foreign arrays are shown in one line; a walk over the keys ends."""
    with lmdb.open(str(tmp_path), lock=False) as env, env.begin(write=True) as transaction:
        transaction.put(b"x\ny_shape", b"1")
        transaction.put(b"z" * 400 + b"_shape", b"1")
    with pytest.raises(UserError, match=r"arrays there: 'x\\ny', z{40}\)") as error:
        LmdbArrays(tmp_path, LATENTS)
    assert "\n" not in str(error.value)
    content = (tmp_path / "data.mdb").read_bytes()
    (tmp_path / "data.mdb").write_bytes(content.replace(b"x\ny_shape", b"~\ny_shape"))
    with pytest.raises(UserError, match="its keys are out of order"):
        LmdbArrays(tmp_path, LATENTS)
