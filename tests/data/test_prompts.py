"""Prompt lists of every kind, and every mistake in one, with its line."""

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fewstep.data.prompts import load_prompts
from fewstep.errors import UserError

PROMPTS = ["a red cat", 'a "quoted", dog', "ein Hündchen\u2028noch eins", "a red cat"]


def write(path: Path, prompts: list[Any], column: str = "text") -> Path:
    if path.suffix == ".txt":
        path.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(prompts))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"file_name": "a.png", column: p}) + "\n" for p in prompts))
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["id", column], *enumerate(prompts)])
    else:
        pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(prompts))), column: prompts}), path)
    return path


def refused(path: Path, column: str = "text") -> str:
    with pytest.raises(UserError) as error:
        load_prompts(path, column)
    assert str(path) in str(error.value)
    return str(error.value)


SUFFIXES = ["txt", "pkl", "jsonl", "csv", "parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    assert load_prompts(write(tmp_path / f"prompts.{suffix}", PROMPTS)) == PROMPTS


@pytest.mark.parametrize("suffix", SUFFIXES[2:])
def test_another_column(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"prompts.{suffix}", PROMPTS, "caption")
    assert load_prompts(str(path), "caption") == PROMPTS
    assert "has no column column='captoin' among" in refused(path, "captoin")
    assert "; did you mean 'caption'?" in refused(path, "captoin")
    assert "did you mean" not in refused(path, "zzz")


def test_text_files_as_editors_write_them(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa cat\r\na dog\r\nlast")
    assert load_prompts(path) == ["a cat", "a dog", "last"]
    path.write_bytes(b"a cat\ra dog\rlast\r")  # of old Macs; the three would be one prompt
    assert load_prompts(path) == ["a cat", "a dog", "last"]


@pytest.mark.parametrize("place", ["metadata.jsonl", "metadata.csv", "metadata.parquet", "train/metadata.jsonl"])
def test_a_folder_of_captioned_pictures(tmp_path: Path, place: str) -> None:
    (tmp_path / "train").mkdir()
    write(tmp_path / place, PROMPTS)
    assert load_prompts(tmp_path) == PROMPTS


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", ["third"])
    write(tmp_path / "a.parquet", ["first", "second"])
    assert load_prompts(tmp_path) == ["first", "second", "third"]


def test_tables_of_a_split_are_no_prompts_of_another(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        write(tmp_path / f"data/{name}.parquet", [name])
    assert load_prompts(tmp_path) == ["train-00000-of-00001"]


@pytest.mark.parametrize(
    ("suffix", "empty"),
    [
        ("txt", ""),
        ("txt", "  "),
        ("jsonl", ""),
        ("jsonl", None),
        ("csv", ""),
        ("parquet", None),
        ("parquet", " "),
        ("pkl", ""),
    ],
)
def test_an_empty_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, empty: str | None) -> None:
    """Blank lines of a list are skipped, a row of a table without text is the empty prompt, as published; both are said."""
    path = write(tmp_path / f"prompts.{suffix}", ["a cat", empty, "a dog", empty])
    if suffix in ("txt", "pkl"):
        assert load_prompts(path) == ["a cat", "a dog"]
        assert capsys.readouterr().err == f"{path}: 2 blank {'lines' if suffix == 'txt' else 'items'} skipped\n"
    else:
        assert load_prompts(path) == ["a cat", "", "a dog", ""]
        assert capsys.readouterr().err == f"{path}: 2 rows without a prompt count as the empty prompt\n"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_prompts(tmp_path: Path, suffix: str) -> None:
    assert "holds no prompts; give a file with at least one" in refused(write(tmp_path / f"a.{suffix}", []))


def test_an_empty_file_and_an_empty_folder(tmp_path: Path) -> None:
    assert "neither metadata.jsonl" in refused(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"")
    assert "holds no prompts" in refused(tmp_path / "a.txt")


@pytest.mark.parametrize("suffix", [*SUFFIXES, "docx"])
def test_a_missing_file(tmp_path: Path, suffix: str) -> None:
    assert "no such file; check the path" in refused(tmp_path / f"a.{suffix}")


def test_a_kind_that_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    assert "prompts are read from .txt, .parquet, .pkl, .jsonl, .csv files" in refused(tmp_path / "a.docx")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
def test_bytes_that_are_no_utf8(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes("a cat\nein Hündchen\n".encode("latin-1"))
    assert "line 2 is not UTF-8 text (invalid" in refused(path)
    assert "save the file as UTF-8" in refused(path)


@pytest.mark.parametrize(
    ("line", "told"),
    [("{", "line 2 is no JSON ("), ("[1]", "line 2 is no JSON object"), ('{"texts": "a"}', "did you mean 'texts'?"),
     ('{"text": 3}', "line 2 is '3', not text"), ('{"text": "\\ud83d"}', "line 2 holds half a character")],
)  # fmt: skip
def test_a_damaged_line(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a cat"}\n' + line + "\n")
    assert told in refused(path)


def test_damaged_tables(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    assert "cannot be read (" in refused(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text('text\n"open\n')
    assert "is no CSV" in refused(tmp_path / "a.csv")
    assert "row 1 is '7', not text; name a column of texts" in refused(write(tmp_path / "b.parquet", [7]))


def test_a_hostile_pickle(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04cos\nsystem\n\x8c\x04true\x85R.")
    assert "asks for the global 'os.system'" in refused(tmp_path / "a.pkl")


def test_a_comma_without_quotes_is_noticed(tmp_path: Path) -> None:
    """The prompt would end at it."""
    (tmp_path / "a.csv").write_text("text\na cat, sitting\n")
    assert "line 2 has 2 values, the first line names 1 columns" in refused(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text('text\n"a cat, sitting"\n')
    assert load_prompts(tmp_path / "a.csv") == ["a cat, sitting"]
