"""Other people's JSON: an object, or one sentence with the file and the key."""

from pathlib import Path

import pytest

from fewstep.errors import UserError
from fewstep.formats.json_files import entry, read_json_object


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[1]", "it holds a list, not an object"), (b"null", "it holds null, not an object"), (b"{", "is damaged"),
        (b'"x"', "it holds a text"), (b"1", "a whole number"), (b"true", "true or false"), (b"\xff\xfe", "is damaged"),
        (b"[" * 100_000, "nested without end"), (b'{"a":' * 100_000, "nested without end"), (b"", "is damaged"),
    ],
)  # fmt: skip
def test_anything_but_an_object_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        read_json_object(path)
    assert str(caught.value).startswith(str(path))


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(UserError, match="cannot be read"):
            read_json_object(path)


def test_entries_have_their_kind(tmp_path: Path) -> None:
    values = {"steps": [1], "count": True}
    assert entry(values, "steps", list, tmp_path, "again") == [1]
    with pytest.raises(UserError, match="steps is a list, not a whole number or a number; again"):
        entry(values, "steps", (int, float), tmp_path, "again")
    with pytest.raises(UserError, match="count is true or false, not a whole number"):
        entry(values, "count", int, tmp_path, "again")
    with pytest.raises(UserError, match="other is missing"):
        entry(values, "other", int, tmp_path, "again")
