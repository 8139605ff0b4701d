"""What the options of `fewstep sample` ask for, as a list of pictures."""

from pathlib import Path
from typing import Any

import pytest

from fewstep.errors import UserError
from fewstep.models.picture_list import Picture, list_pictures, parse_numbers, parse_size, read_labels, read_seeds


def listed(**given: Any) -> list[tuple[int, int, int | None, str | None]]:
    options: dict[str, Any] = {
        "labels": (), "prompts": (), "num_classes": 4, "num_images": None, "seed": None, "seeds": (), "first": 0,
    }  # fmt: skip
    pictures = list_pictures(**{**options, **given}).pictures
    return [(picture.seed, picture.number, picture.label, picture.prompt) for picture in pictures]


def test_numbers_and_ranges() -> None:
    assert parse_numbers("1,2, 5-8", "--seeds") == [1, 2, 5, 6, 7, 8]
    assert parse_numbers("", "--seeds") == []
    assert read_seeds("18446744073709551615") == [2**64 - 1]


@pytest.mark.parametrize("text", ["a", "1,,2", "1;2", "-3", "1.5", "1-", "5-2", "0-99999999999", "²"])
def test_bad_numbers_name_the_option(text: str) -> None:
    with pytest.raises(UserError, match=r"^--seeds ") as caught:
        read_seeds(text)
    assert "\n" not in str(caught.value)


def test_a_seed_has_64_bits() -> None:
    with pytest.raises(UserError, match="below 2\\^64"):
        read_seeds(str(2**64))


def test_labels_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("3\n\n0,1\n 2-3,\n")
    assert read_labels(str(tmp_path / "labels.txt")) == [3, 0, 1, 2, 3]
    assert read_labels("3,0-1") == [3, 0, 1]
    assert read_labels("") == []


def test_bad_label_files(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_text("3\ncat\n")
    with pytest.raises(UserError, match=r"^--labels .*labels\.txt, line 2: cat: give numbers"):
        read_labels(str(file))
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no labels"):
        read_labels(str(file))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read as text"):
        read_labels(str(file))
    with pytest.raises(UserError, match=r"^--labels .*nothing\.txt: give numbers .*, or a file of them$"):
        read_labels(str(tmp_path / "nothing.txt"))


def test_sizes() -> None:
    assert parse_size("768x512") == (768, 512)
    assert parse_size("64") == (64, 64)
    assert parse_size("") is None
    for text in ("x", "3x", "3x4x5", "-3", "1e3", "1 2"):
        with pytest.raises(UserError, match=r"^--size .*: give height x width"):
            parse_size(text)


def test_one_seed_gives_a_series() -> None:
    assert listed(num_images=6, seed=7) == [(7, number, number % 4, None) for number in range(6)]
    assert listed(labels=[3, 1], num_images=3) == [(0, 0, 3, None), (0, 1, 1, None), (0, 2, 3, None)]
    assert listed(prompts=["a", "b"]) == [(0, 0, None, "a"), (0, 1, None, "b")]
    assert len(listed()) == 16
    assert len(listed(labels=[1, 2, 3])) == 3
    assert listed(num_classes=0, num_images=2) == [(0, 0, None, None), (0, 1, None, None)]


def test_a_series_can_be_made_in_parts() -> None:
    """First and number of pictures cut the same list: labels and prompts stay where they were."""
    for given in ({}, {"labels": [3, 1, 0]}, {"prompts": ["a", "b"]}):
        assert listed(**given, num_images=10)[4:] == listed(**given, num_images=6, first=4)


def test_several_seeds_times_prompts_or_labels() -> None:
    assert listed(prompts=["a", "b"], seeds=[1, 5]) == [
        (1, 0, None, "a"), (5, 0, None, "a"), (1, 0, None, "b"), (5, 0, None, "b"),
    ]  # fmt: skip
    assert listed(labels=[2], seeds=[1, 5]) == [(1, 0, 2, None), (5, 0, 2, None)]
    assert listed(num_classes=0, seeds=[1, 5]) == [(1, 0, None, None), (5, 0, None, None)]
    options: dict[str, Any] = {"num_classes": 4, "num_images": None, "seed": None, "first": 0}
    assert list_pictures(**options, labels=[1, 2], prompts=(), seeds=[1, 2, 3]).columns == 3
    assert Picture(1, 0).label is None


@pytest.mark.parametrize("given", [{"seed": 0}, {"num_images": 2}, {"first": 1}])
def test_seeds_exclude_the_options_of_a_series(given: dict[str, int]) -> None:
    with pytest.raises(UserError, match="--seeds makes one picture a seed and prompt or label: leave out"):
        listed(prompts=["a"], seeds=[1], **given)


def test_seeds_need_labels_where_there_are_classes() -> None:
    with pytest.raises(UserError, match=r"give --labels, e\.g\. 0-3"):
        listed(seeds=[1, 2])


def test_a_long_list_of_labels_is_no_file_name() -> None:
    """A hundred numbers are longer than a file name may be."""
    assert read_labels(",".join(map(str, range(100)))) == list(range(100))


def test_no_more_pictures_than_a_slip_of_the_finger_makes() -> None:
    with pytest.raises(UserError, match="--num-images 1000000000000: at most 1000000 at once"):
        listed(num_images=10**12)
