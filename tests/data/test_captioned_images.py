"""Captioned pictures from every kind of source, in order, from any row on."""

import io
import json
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from fewstep.data.captioned_images import open_captioned_images
from fewstep.data.pictures import decode_picture
from fewstep.data.tars import check_tar
from fewstep.errors import UserError
from tests.cli.test_main import fewstep
from tests.tiny_models import tiny_sd_folder


def png(grey: int, size: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), grey, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(folder: Path, captions: list[str], size: int = 16) -> Path:
    """Pictures whose grey is their number, and a metadata.jsonl."""
    folder.mkdir(parents=True)
    for number in range(len(captions)):
        (folder / f"{number:03d}.png").write_bytes(png(number, size))
    rows = [{"file_name": f"{number:03d}.png", "text": caption} for number, caption in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_tar(path: Path, captions: list[str], first: int = 0) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, caption in enumerate(captions, start=first):
            for suffix, content in (("png", png(number)), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_parquet(path: Path, captions: list[str]) -> Path:
    pictures = [{"bytes": png(number), "path": None} for number in range(len(captions))]
    rows = datasets.Dataset.from_dict({"image": pictures, "text": captions})
    rows.cast_column("image", datasets.Image()).to_parquet(path)
    return path


CAPTIONS = [f"cat {number}" for number in range(70)]


def answer_for_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[dict[str, Any]]:
    """`datasets.load_dataset` finds the parquet files of `folder` under the hub id me/pictures; returns what it was asked."""
    original, asked = datasets.load_dataset, list[dict[str, Any]]()

    def load_dataset(name: str, **options: Any) -> Any:
        if name == "me/pictures":
            asked.append(options)
            return original("parquet", data_dir=str(folder), **options)
        return original(name, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data/train-00000.parquet", CAPTIONS)
    asked = answer_for_the_hub(monkeypatch, tmp_path / "data")
    source = open_captioned_images("me/pictures", streaming=streaming)
    assert asked == [{"split": "train", "streaming": streaming}]
    assert source.num_rows == (None if streaming else 70)
    for first in (0, 40):
        rows = list(islice(source.rows(first), 3))
        assert [row.caption for row in rows] == CAPTIONS[first : first + 3]
        greys = [int(decode_picture(row.picture, row.name, 16, 3, "exact")[0, 0, 0]) for row in rows]
        assert greys == list(range(first, first + 3))


@pytest.mark.slow
def test_latents_of_the_first_rows_of_a_streamed_hub_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user types it: three rows are encoded of a set whose length nobody asked for."""
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data/train-00000.parquet", [f"cat {number % 2}" for number in range(9)])
    asked = answer_for_the_hub(monkeypatch, tmp_path / "data")
    answer = fewstep(
        "prepare", "latents", tiny_sd_folder(tmp_path / "sd"), tmp_path / "latents", "--images", "me/pictures", "--streaming",
        "--num-images", 3, "--device", "cpu",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert asked == [{"split": "train", "streaming": True}]
    assert "3 latents of shape 4x8x8, 2 distinct captions" in answer.out


@pytest.mark.parametrize("kind", ["folder", "parquet", "tar", "tars"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_source(tmp_path: Path, kind: str, streaming: bool) -> None:
    path = tmp_path / kind
    if kind == "folder":
        write_folder(path, CAPTIONS)
    elif kind == "parquet":
        path = write_parquet(path.with_suffix(".parquet"), CAPTIONS)
    elif kind == "tar":
        path = write_tar(path.with_suffix(".tar"), CAPTIONS)
    else:
        path.mkdir()
        write_tar(path / "b.tar", CAPTIONS[30:], first=30)
        write_tar(path / "a.tar", CAPTIONS[:30])
    source = open_captioned_images(str(path), streaming=streaming)
    assert source.num_rows == (None if streaming or "tar" in kind else 70)
    for first in (0, 29, 69, 70):
        rows = list(source.rows(first))
        assert [row.caption for row in rows] == CAPTIONS[first:]
        greys = [int(decode_picture(row.picture, row.name, 16, 3, "exact")[0, 0, 0]) for row in rows]
        assert greys == list(range(first, 70))
        assert all(f"(row {number}" in row.name for number, row in enumerate(rows, start=first))


def refused(source: object, **options: str) -> str:
    """Why a source, or the first row of it that cannot be used, is refused."""
    with pytest.raises(UserError) as error:
        _read_all(source, **options)
    return str(error.value)


def _read_all(source: object, **options: str) -> None:
    for row in open_captioned_images(str(source), **options).rows(0):
        if row.fault is not None:
            raise row.fault


def test_every_cut_of_a_tar_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", ["one", "two", "three"])
    content = path.read_bytes()
    check_tar(path)
    end = content.rindex(b"three") // 512 * 512 + 512
    for size in [0, 1, 511, 512, 513, 700, 1024, 1025, 1536, 2048, 3000, end - 1, end, end + 511]:
        path.write_bytes(content[:size])
        told = f"{path} is cut short: it ends at byte {size} without the end mark of a tar; download or write it again"
        assert refused(path) == told
    path.write_bytes(content[: end + 512])
    assert len(list(open_captioned_images(str(path)).rows(0))) == 3


def test_no_tar(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"word" * 1000)
    assert "is no tar file, or damaged at byte 0" in refused(tmp_path / "a.tar")
    assert "cannot be read ([Errno 2]" in refused(tmp_path / "b.tar")


def test_missing_things_are_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "none") == f"{tmp_path / 'none'}: no such folder, parquet file or tar"
    assert "no/such/set: no such folder" in refused("no/such/set")
    assert "cannot be read" in refused("nobody/nothing")
    folder = write_folder(tmp_path / "pictures", ["a"])
    assert "has no column --caption-column='txet' among ['image', 'text']; did you mean 'text'?" in refused(
        folder, caption_column="txet"
    )
    (folder / "metadata.jsonl").unlink()
    assert "or into NAME.txt beside NAME.png) has no column --caption-column='text'" in refused(folder)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    assert "no column of pictures among ['text']" in refused(tmp_path / "a.parquet")


def test_captions_that_are_no_text(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", ["a"])
    (folder / "metadata.jsonl").write_text('{"file_name": "000.png", "text": 3}\n')
    assert (
        "000.png (row 0): the caption is int, not text; mend it, or name another column with --caption-column"
        in refused(folder)
    )


def test_captions_beside_pictures(tmp_path: Path) -> None:
    """kohya's layout; a picture without its text file is left out and counted."""
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        (tmp_path / f"{number}.TXT").write_text(f"\ufeffa cat number {number}\n", encoding="utf-8")
    (tmp_path / "3.png").write_bytes(png(3))
    source = open_captioned_images(str(tmp_path))
    assert [row.caption for row in source.rows(0)] == [f"a cat number {number}" for number in range(3)]
    (tmp_path / "1.TXT").write_bytes(b"\xff\xfe")
    assert "cannot be read as UTF-8 text" in refused(tmp_path)


def test_tars_of_mixed_formats_in_a_folder_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "tars [2024]"
    folder.mkdir()
    for name, kind in (("a", "JPEG"), ("b", "WEBP")):
        with tarfile.open(folder / f"{name}.TAR", "w") as tar:
            buffer = io.BytesIO()
            Image.new("RGB", (16, 16), "red").save(buffer, kind)
            caption = json.dumps({"caption": f"of {name}"}).encode()
            for suffix, content in ((kind.lower(), buffer.getvalue()), ("txt", name.encode()), ("json", caption)):
                member = tarfile.TarInfo(f"dir/{name}0.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert [row.caption for row in open_captioned_images(str(folder)).rows(0)] == ["a", "b"]
    by_field = open_captioned_images(str(folder), caption_column="caption")
    assert [row.caption for row in by_field.rows(0)] == ["of a", "of b"]
    assert "row dir/a0 has no caption --caption-column='words' among its members (jpeg, json, txt)" in refused(
        folder, caption_column="words"
    )


def test_tars_of_splits_are_not_one_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(["train-000.tar", "val-000.tar", "train-001.tar"]):
        write_tar(tmp_path / name, [name], first=number)

    def captions(split: str) -> list[str]:
        return [row.caption for row in open_captioned_images(str(tmp_path), split=split).rows(0)]

    assert captions("train") == ["train-000.tar", "train-001.tar"]
    assert f"{tmp_path}: 2 tars (split train of train, val)" in capsys.readouterr().err
    assert captions("validation") == ["val-000.tar"]
    with pytest.raises(UserError, match="has the splits train, val and no split 'test'"):
        captions("test")


def test_a_tar_of_negative_size_is_refused_at_once(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", ["one"])
    content = bytearray(path.read_bytes())
    content[124:136] = b"-0000001000\0"
    path.write_bytes(content)
    assert "is no tar file, or damaged at byte 0" in refused(path)


def test_captions_beside_pictures_are_not_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "10_cat"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(png(1))
        (folder / f"{name}.txt").write_text("a cat")
    (folder / "notes.md").write_text("x")
    open_captioned_images(str(tmp_path))
    assert "2 pictures; 1 file left out: 1 not pictures (.md)" in capsys.readouterr().err


def test_metadata_with_full_paths(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    row = {"file_name": str(tmp_path / "a.png"), "text": "a cat"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert [found.caption for found in open_captioned_images(str(tmp_path)).rows(0)] == ["a cat"]


def test_columns_of_pictures_of_other_tools(tmp_path: Path) -> None:
    """What pyarrow, pandas and polars write has no features of `datasets`; of several columns of pictures none is guessed."""
    kinds: dict[str, list[Any]] = {
        "bytes": [png(7)], "image": [{"bytes": png(7), "path": "x"}], "picture": [{"bytes": png(7), "path": None}],
    }  # fmt: skip
    for name in ("bytes", "image"):
        pyarrow.parquet.write_table(pyarrow.table({name: kinds[name], "text": ["a"]}), tmp_path / f"{name}.parquet")
        (row,) = open_captioned_images(str(tmp_path / f"{name}.parquet")).rows(0)
        assert decode_picture(row.picture, "", 16, 3, "exact").max() == 7
    both = datasets.Dataset.from_dict({"mask": kinds["picture"], "photo": kinds["picture"], "text": ["a"]})
    for column in ("mask", "photo"):
        both = both.cast_column(column, datasets.Image())
    both.to_parquet(tmp_path / "two.parquet")
    assert "has several columns of pictures (mask, photo), and only one" in refused(tmp_path / "two.parquet")
    both.rename_column("photo", "image").to_parquet(tmp_path / "named.parquet")
    assert open_captioned_images(str(tmp_path / "named.parquet"))._image == "image"


def test_what_is_no_set_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    assert "a.tar.gz is a file of another kind than a folder, parquet file or tar" in refused(tmp_path / "a.tar.gz")
    assert "is no file or folder here, and as a data set of the hub it cannot be read" in refused("no-such-set")
    rows = datasets.Dataset.from_dict({"image": [{"bytes": png(1), "path": None}], "text": ["a"]})
    rows = rows.cast_column("image", datasets.Image())
    rows.save_to_disk(tmp_path / "disk")
    assert "it was written by save_to_disk of datasets" in refused(tmp_path / "disk")
    (tmp_path / "hub").mkdir()
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / f"hub/{split}-00000-of-00001.parquet")
    open_captioned_images(str(tmp_path / "hub"))
    assert "hub: 1 picture (split train of test, train)" in capsys.readouterr().err


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_a_tars_masks_and_empty_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member without content is never read from the disk, where a file of its name may lie."""
    masked = tar_of(tmp_path / "a.tar", {"0.seg.png": png(9), "0.jpg": png(5), "0.txt": b"a"})
    (row,) = open_captioned_images(str(masked)).rows(0)
    assert decode_picture(row.picture, "", 16, 3, "exact").max() == 5
    two = tar_of(tmp_path / "b.tar", {"0.png": png(9), "0.jpg": png(5), "0.txt": b"a"})
    assert "row 0 has 2 pictures, of which only one can be meant" in refused(two)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.png").write_bytes(png(3))
    (row,) = open_captioned_images(str(tar_of(tmp_path / "c.tar", {"0.png": b"", "0.txt": b"a"}))).rows(0)
    with pytest.raises(UserError, match="picture 0 does not decode"):
        decode_picture(row.picture, "0", 16, 3, "exact")


def test_captions_in_a_tar_are_text_files(tmp_path: Path) -> None:
    """They are read as those beside pictures are: bytes that are not UTF-8 are refused, marks and line ends are no words."""
    path = tar_of(tmp_path / "a.tar", {"0.png": png(1), "0.txt": "\ufeffa café\r\n".encode()})
    assert [row.caption for row in open_captioned_images(str(path)).rows(0)] == ["a café"]
    path = tar_of(tmp_path / "b.tar", {"0.png": png(1), "0.txt": "a café".encode("latin-1")})
    assert "b.tar: the .txt of row 0 is not UTF-8 text" in refused(path)
    table = pyarrow.table({"image": [{"bytes": png(7), "path": "x"}], "text": ["café".encode("latin-1")]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    assert "the caption is not UTF-8 text" in refused(tmp_path / "c.parquet")


def test_nothing_in_a_tar_is_lost_without_a_word(tmp_path: Path) -> None:
    """Rows of one key that follow each other, links, and what stands behind the end mark of a tar that cat joined."""
    path, names = tmp_path / "twice.tar", ["0.png", "0.txt", "0.png", "0.txt"]
    with tarfile.open(path, "w") as tar:
        for name, content in zip(names, [png(1), b"one", png(2), b"two"], strict=True):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert "row 0 has png more than once among its members" in refused(path)
    cased = tar_of(tmp_path / "cased.tar", {"0.png": png(1), "0.PNG": png(2), "0.txt": b"a"})
    assert "row 0 has png more than once" in refused(cased)

    links = tar_of(tmp_path / "links.tar", {"0.png": png(4), "0.txt": b"a"})
    with tarfile.open(links, "a") as tar:
        for name, target, kind in (("1.png", "0.png", tarfile.LNKTYPE), ("1.txt", "0.txt", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    rows = list(open_captioned_images(str(links)).rows(0))
    assert [row.caption for row in rows] == ["a", "a"]
    assert rows[0].picture["bytes"] == rows[1].picture["bytes"]
    with tarfile.open(links, "a") as tar:
        for name, target in (("2.png", "/etc/passwd"), ("3.png", "3.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    assert "its member 2.png is a link to /etc/passwd, which is no file of this tar" in refused(links)

    first, second = (tar_of(tmp_path / name, {f"{name}.png": png(1), f"{name}.txt": b"a"}) for name in ("a", "b"))
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    assert "has members behind the end mark at byte" in refused(joined)


def test_a_damaged_header_in_a_tar_is_noticed(tmp_path: Path) -> None:
    """Readers end at a header whose sum is wrong as at the end of the tar: the rows behind it would be missing without a word."""
    whole = bytearray(write_tar(tmp_path / "x.tar", CAPTIONS[:4]).read_bytes())
    check_tar(tmp_path / "x.tar")
    place = whole.index(b"002.png")
    whole[place] ^= 1
    (tmp_path / "x.tar").write_bytes(whole)
    with pytest.raises(UserError, match=rf"x\.tar is no tar file, or damaged at byte {place}"):
        check_tar(tmp_path / "x.tar")


def test_a_caption_of_spaces_is_none(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "x.parquet", ["x", " \t", ""])
    assert [row.caption for row in open_captioned_images(str(table)).rows(0)] == ["x", "", ""]
