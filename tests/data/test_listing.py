"""Which files belong to a data set."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fewstep.data.captioned_images import open_captioned_images
from fewstep.data.listing import list_pictures_below
from fewstep.data.tables import has_split, picture_tables, split_files
from fewstep.errors import UserError


def write(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".jpg", ".jfif", ".avif", ".tiff"):
            Image.new("L", (4, 4)).save(path, format="PNG")
        else:
            path.write_text("{}" if path.suffix == ".json" else "words")
    return folder


def refused(folder: Path, split: str = "train") -> str:
    with pytest.raises(UserError) as error:
        list_pictures_below(folder, split)
    return str(error.value)


def test_words_in_names_mean_nothing(tmp_path: Path) -> None:
    """A library's guess of splits by the words train and test in names left out the rest."""
    names = ["cat.png", "test-tube.png", "train-station.png", "train_tracks.PNG", "sub/testing.jfif", "sub/boat.avif"]
    listing = list_pictures_below(write(tmp_path, *names))
    assert listing.names == sorted(names)
    assert listing.sentence() == "6 pictures"


@pytest.mark.parametrize("name", ["photos [2024]", "photos {a,b}", "what?", "star*", "ünïcode ☃"])
def test_any_folder_name(tmp_path: Path, name: str) -> None:
    assert list_pictures_below(write(tmp_path / name, "[1].png", "sub [x]/2.png")).names == ["[1].png", "sub [x]/2.png"]


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "notes.txt", "more.TXT", "x.json", ".hidden.png", "Thumbs.db", ".git/b.png", "no_suffix")
    assert list_pictures_below(tmp_path).sentence() == (
        "1 picture; 6 files left out: 2 hidden, 4 not pictures (.txt, .json, no suffix)"
    )


def test_splits_only_where_everything_is_divided(tmp_path: Path) -> None:
    write(tmp_path / "divided", "train/a/1.png", "train/b/2.png", "Test/a/3.png", "readme.txt")
    train = list_pictures_below(tmp_path / "divided")
    assert (train.names, train.class_names) == (["a/1.png", "b/2.png"], ["a", "b"])
    assert "2 pictures in 2 folders (split train of Test, train)" in train.sentence()
    assert list_pictures_below(tmp_path / "divided", "test").names == ["a/3.png"]
    assert refused(tmp_path / "divided", "validation").endswith("has the splits Test, train and no split 'validation'")
    write(tmp_path / "classes", "train/1.png", "bus/2.png", "boat/3.png")
    vehicles = list_pictures_below(tmp_path / "classes")
    assert vehicles.class_names == ["boat", "bus", "train"]
    assert "train taken as ordinary folders, because boat, bus lie beside" in vehicles.sentence()
    assert "is not divided into splits" in refused(tmp_path / "classes", "test")


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "1.png")
    write(tmp_path / "set", "0.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "set/linked")
    os.symlink(tmp_path / "set", tmp_path / "set/circle")
    assert list_pictures_below(tmp_path / "set").names == ["0.png", "linked/1.png"]


def test_metadata_of_several_folders(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "b/2.png", "b/3.png")
    (tmp_path / "a/metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "one"}) + "\n\n")
    (tmp_path / "b/metadata.csv").write_text("file_name,text,label\n./2.png,two,5\n")
    listing = list_pictures_below(tmp_path)
    assert listing.metadata == {"a/1.png": {"text": "one"}, "b/2.png": {"text": "two", "label": "5"}}
    assert listing.columns == ["text", "label"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"file_name": "2.png"}', "line 1 names 2.png, which is no picture below"),
        ('{"text": "x"}', "line 1 has no file_name among ['text']"),
        ('{"file_name": "1.png", "a": 1}\n{"file_name": "1.png", "a": 2}', "line 2 names 1.png a second time"),
        ("[1, 2]", "line 1 is not a JSON object"),
        ("{broken", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path: Path, content: str | bytes, told: str) -> None:
    write(tmp_path, "1.png")
    (tmp_path / "metadata.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert told in refused(tmp_path)
    assert "metadata.jsonl" in refused(tmp_path)


def test_the_fingerprint_is_of_the_data(tmp_path: Path) -> None:
    first = list_pictures_below(write(tmp_path / "one", "a/1.png", "2.png")).fingerprint()
    (tmp_path / "one").rename(tmp_path / "two")
    assert list_pictures_below(tmp_path / "two").fingerprint() == first
    (tmp_path / "two/a/1.png").write_bytes(b"more bytes than before" * 20)
    other = list_pictures_below(tmp_path / "two").fingerprint()
    assert other != first
    write(tmp_path / "two", "3.png")
    assert list_pictures_below(tmp_path / "two").fingerprint() not in (first, other)


def test_parquet_files_of_a_split(tmp_path: Path) -> None:
    files = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"]
    write(tmp_path / "hub", *files)
    assert [path.name for path in split_files(tmp_path / "hub", "train", "x")] == sorted(files[:2])
    assert [path.name for path in split_files(tmp_path / "hub", "test", "x")] == [files[2]]
    write(tmp_path / "own", "training_set.parquet", "test tubes.PARQUET", "metadata.parquet")
    assert len(split_files(tmp_path / "own", "train", "x")) == 2
    for place, split in (("hub", "validation"), ("own", "test")):
        with pytest.raises(UserError, match=f"no split '{split}'"):
            split_files(tmp_path / place, split, "x")


@pytest.mark.slow
def test_ten_thousand_pictures_are_listed_in_a_moment(tmp_path: Path) -> None:
    import time

    for folder in range(10):
        (tmp_path / str(folder)).mkdir()
        for number in range(1000):
            (tmp_path / f"{folder}/{number}.png").touch()
    started = time.perf_counter()
    assert len(list_pictures_below(tmp_path).names) == 10_000
    assert time.perf_counter() - started < 7  # 0.1 s on a quiet machine; 15 s by pattern


def test_pipes_and_devices_are_no_pictures(tmp_path: Path) -> None:
    """Reading a pipe that nobody writes to never ends."""
    write(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    os.symlink("/dev/zero", tmp_path / "c.png")
    assert list_pictures_below(tmp_path).names == ["a.png"]


def test_metadata_beside_the_splits(tmp_path: Path) -> None:
    write(tmp_path, "train/0.png", "train/1.png", "test/0.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\ntrain/0.png,3\ntest/0.png,4\n")
    for split, row in (("train", {"0.png": {"label": "3"}}), ("test", {"0.png": {"label": "4"}})):
        assert list_pictures_below(tmp_path, split).metadata == row


def test_a_comma_without_quotes_is_noticed(tmp_path: Path) -> None:
    """A caption would end at it."""
    write(tmp_path, "0.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a cat, sitting\n")
    assert "line 2 has 3 values, the first line names 2 columns" in refused(tmp_path)
    (tmp_path / "metadata.csv").write_text('file_name,text\n0.png,"a cat, sitting"\n')
    assert list_pictures_below(tmp_path).metadata == {"0.png": {"text": "a cat, sitting"}}
    (tmp_path / "metadata.csv").write_text("file_name,text,text\n0.png,a,b\n")
    assert "names column 'text' more than once" in refused(tmp_path)


def test_pictures_that_are_not_read_are_counted_apart(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.HEIC", "c.jxl", "d.txt")
    assert list_pictures_below(tmp_path).sentence() == (
        "1 picture; 3 files left out: 1 not pictures (.txt), 2 pictures of kinds that are not read (.heic, .jxl)"
    )


def test_pictures_and_tables_in_one_folder(tmp_path: Path) -> None:
    """One of them would be left out."""
    write(tmp_path, "a.png", "sub/captions.parquet")
    with pytest.raises(UserError, match=r"has pictures .a.png, .... and tables .sub/captions.parquet, ...."):
        picture_tables(tmp_path, "there")
    with pytest.raises(UserError, match="pictures"):
        open_captioned_images(str(tmp_path))


def test_captions_beside_pictures_below_a_link(tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere", "0.png", "0.TXT")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/link").symlink_to(elsewhere)
    captions = [row.caption for row in open_captioned_images(str(tmp_path / "set")).rows(0)]
    assert captions == ["words"]


def test_whether_there_is_a_split(tmp_path: Path) -> None:
    write(tmp_path / "pictures", "train/0.png", "test/0.png")
    write(tmp_path / "tables", "train-0.parquet", "val-0.parquet")
    write(tmp_path, "alone.parquet")
    assert has_split(tmp_path / "pictures", "test")
    assert has_split(tmp_path / "tables", "validation")
    assert not has_split(tmp_path / "tables", "test")
    assert not has_split(tmp_path / "alone.parquet", "test")


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`os.walk` would pass it over, and its class with it; as root everything can be listed, so that it is imitated."""
    write(tmp_path, "a/1.png", "b/2.png")
    listed = os.scandir

    def scandir(place: str) -> Any:
        if str(place).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(place))
        return listed(place)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "b cannot be listed (Permission denied); allow it, or take it away" in refused(tmp_path)


def test_numbered_folders_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """By their letters, 10 comes before 2, and `--labels 2` would make pictures of 10."""
    write(tmp_path, *[f"{number}/x.png" for number in range(12)])
    assert list_pictures_below(tmp_path).class_names == [str(number) for number in range(12)]


def test_folders_that_give_no_class_are_told(tmp_path: Path) -> None:
    """An empty one, and a link to one that is listed; a link to a folder above is nothing that is left out."""
    write(tmp_path, "cat/x.png", "dog/y.png", "notes/z.txt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "zebra").symlink_to(tmp_path / "cat")
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    (tmp_path / "round").symlink_to("round")
    sentence = list_pictures_below(tmp_path).sentence()
    assert sentence.startswith("2 pictures in 2 folders; ")
    assert "2 folders (empty, notes) without pictures" in sentence
    assert "1 folder (zebra) left out: the same as one that is listed, by a link" in sentence


@pytest.mark.parametrize(
    ("picture", "name"),
    [
        ("cafe\u0301/e\u0301.png", "caf\xe9/\xe9.png"),  # as macOS writes names, and as everything else does
        ("caf\xe9.png", "cafe\u0301.png"), ("sub/a.png", "sub\\a.png"), ("sub\\a.png", "sub\\a.png"), ("a.png", "../HERE/a.png"),
    ],
)  # fmt: skip
def test_what_metadata_may_call_a_picture(tmp_path: Path, picture: str, name: str) -> None:
    write(tmp_path, picture)
    row = {"file_name": name.replace("HERE", tmp_path.name), "label": 1}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert list_pictures_below(tmp_path).metadata == {picture: {"label": 1}}


def test_metadata_with_full_paths_through_a_link(tmp_path: Path) -> None:
    write(tmp_path, "real/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "metadata.jsonl").write_text(
        json.dumps({"file_name": str(tmp_path / "real" / "a.png"), "label": 1})
    )
    assert list_pictures_below(tmp_path / "link").metadata == {"a.png": {"label": 1}}


def test_metadata_that_means_two_pictures_or_another_one(tmp_path: Path) -> None:
    """Two that only their accents' form tells apart are not guessed between; case is a guess that is said, not taken."""
    write(tmp_path, "caf\xe9.png", "cafe\u0301.png", "Dog.PNG")
    for name, told in (("CAF\xc9.png", "did you mean caf"), ("dog.png", r"did you mean Dog\.PNG")):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name}))
        with pytest.raises(UserError, match=told):
            list_pictures_below(tmp_path)
    for name in ("caf\xe9.png", "cafe\u0301.png"):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "label": 0}))
        assert list(list_pictures_below(tmp_path).metadata) == [name]


def test_a_space_behind_every_comma(tmp_path: Path) -> None:
    """It belongs to no column's name: " label" would label nothing, without a word."""
    write(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text('file_name, label, text\na.png, 1, "x, y"\nb.png, 0, z\n')
    listing = list_pictures_below(tmp_path)
    assert listing.columns == ["label", "text"]
    assert listing.metadata["a.png"] == {"label": "1", "text": "x, y"}
