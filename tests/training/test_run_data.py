"""A continued run goes on with the same data wherever it lies, and notices other data."""

from pathlib import Path

import pytest

from fewstep.errors import UserError
from fewstep.training.run_data import FILE, claim_data, read_content


def write(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data", a__png=b"pixels", b__PNG=b"more", weights__safetensors=b"w" * 50, __hidden=b"x")


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Path:
    """A run that began with the data."""
    folder = write(tmp_path / "run")
    claim_data(folder, {"data.images": str(data), "teacher.path": ""}, None)
    return folder


def go_on(run: Path, began: Path, now: str, **options: bool) -> set[str]:
    return claim_data(run, {"data.images": now}, {"data.images": str(began)}, **options)


def test_the_same_folder_by_another_spelling_and_after_a_move(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    assert go_on(run, data, "data") == {"data.images"}
    assert go_on(run, data, "./data/") == {"data.images"}
    moved = data.rename(data.parent / "elsewhere")
    assert go_on(run, data, str(moved)) == {"data.images"}


@pytest.mark.parametrize(
    ("name", "content"),
    [("c.png", b"new"), ("a.png", b"longer than before"), ("weights.safetensors", b"v" * 50), ("sub", None)],
)
def test_other_data_is_noticed(run: Path, data: Path, name: str, content: bytes | None) -> None:
    if content is None:
        write(data / name, d__png=b"below")
    else:
        (data / name).write_bytes(content)
    with pytest.raises(UserError, match=r"data\.images=.* holds other files than this run began with \(3 then, \d now"):
        go_on(run, data, str(data))
    assert go_on(run, data, str(data), data_changed=True) == {"data.images"}
    assert go_on(run, data, str(data)) == {"data.images"}  # noted


def test_data_that_has_gone(run: Path, data: Path) -> None:
    data.rename(data.parent / "elsewhere")
    with pytest.raises(UserError, match="is not there, and this run began with"):
        go_on(run, data, str(data))


def test_hidden_files_do_not_count(run: Path, data: Path) -> None:
    write(data, __DS_Store=b"junk")
    assert go_on(run, data, str(data)) == {"data.images"}


def test_a_run_of_before_compares_texts(run: Path, data: Path) -> None:
    (run / FILE).unlink()
    assert go_on(run, data, f"{data}/") == set()
    assert go_on(run, data, str(data)) == {"data.images"}


def test_names_of_nothing_local() -> None:
    assert read_content("org/name").num_files == 0
    assert read_content("org/name") == read_content("org/name")
    assert read_content("org/name").fingerprint != read_content("org/other").fingerprint
    assert read_content("bundled:fashion-mnist").num_files > 0


@pytest.mark.parametrize("text", ["{", "[]", '{"data.images": 3}', '{"data.images": {"x": 1}}'])
def test_a_damaged_note(run: Path, data: Path, text: str) -> None:
    (run / FILE).write_text(text)
    with pytest.raises(UserError, match=r"data\.json is damaged"):
        go_on(run, data, str(data))
