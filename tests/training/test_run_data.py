"""A continued run goes on with the same data wherever it lies, and notices other data."""

from pathlib import Path

import pytest

from fewstep.errors import UserError
from fewstep.training.run_data import FILE, note_data, read_content, read_contents, same_data


def write(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data", a__png=b"pixels", b__PNG=b"more", metadata__csv=b"w" * 50, __hidden=b"x")


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Path:
    """A run that began with the data."""
    folder = write(tmp_path / "run")
    note_data(folder, read_contents({"data.images": str(data), "teacher.path": ""}))
    return folder


def go_on(run: Path, began: Path, now: str, **options: bool) -> set[str]:
    values = {"data.images": now}
    contents = read_contents(values)
    same = same_data(run, contents, values, {"data.images": str(began)}, **options)
    note_data(run, contents)
    return same


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
    [("c.png", b"new"), ("a.png", b"longer than before"), ("metadata.csv", b"v" * 50), ("sub", None)],
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


def test_files_that_are_no_data_do_not_count(run: Path, data: Path) -> None:
    """Left by a desktop, or by the user beside the pictures."""
    write(data, __DS_Store=b"junk", Thumbs__db=b"junk", notes__txt=b"mine")
    assert go_on(run, data, str(data)) == {"data.images"}


def test_of_a_teachers_run_the_teacher_counts(tmp_path: Path) -> None:
    """A report, another checkpoint or TensorBoard's files in the run folder are no other teacher."""
    run = write(tmp_path / "run", metrics__jsonl=b"{}")
    write(run / "teacher", weights__safetensors=b"w" * 50)
    before = read_contents({"teacher.path": str(run)})
    write(run, run_report__html=b"x", log__txt=b"more")
    write(run / "teacher", README__md=b"x")
    assert read_contents({"teacher.path": str(run)}) == before
    write(run / "teacher", weights__safetensors=b"v" * 50)
    assert read_contents({"teacher.path": str(run)}) != before


@pytest.mark.slow
def test_a_run_as_a_user_continues_it(
    teacher_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data are looked through once, however often they are compared."""
    import shutil

    from fewstep.training import run_folder
    from fewstep.training.run import train
    from tests.training.helpers import tiny_train_settings

    shutil.copytree(pictures, tmp_path / "here")
    settings = tiny_train_settings(teacher_folder, tmp_path / "here", tmp_path / "run", training={"num_steps": 2})
    train(settings)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = tiny_train_settings(teacher_folder, tmp_path / "there", tmp_path / "run", training={"num_steps": 4})
    looked: list[dict[str, object]] = []
    monkeypatch.setattr(run_folder, "read_contents", lambda values: looked.append(values) or read_contents(values))
    assert sum("fake_score_loss" in row for row in train(moved).metrics) == 4
    assert len(looked) == 1
    next((tmp_path / "there").rglob("*.png")).unlink()
    with pytest.raises(UserError, match=r"\(24 then, 23 now; .* repeat with --data-changed"):
        train(moved)
    train(moved, data_changed=True)


def test_a_run_of_before_compares_texts(run: Path, data: Path) -> None:
    (run / FILE).unlink()
    assert go_on(run, data, f"{data}/") == set()
    (run / FILE).unlink()
    assert go_on(run, data, str(data)) == {"data.images"}


def test_names_of_nothing_local() -> None:
    assert read_content("org/name").num_files == 0
    assert read_content("org/name") == read_content("org/name")
    assert read_content("org/name").fingerprint != read_content("org/other").fingerprint
    assert read_content("bundled:fashion-mnist").num_files > 0


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"data.images": 3}', '{"data.images": {"x": 1}}']
    + [
        f'{{"data.images": {{"source": "a", "fingerprint": {text}, "num_files": 3}}}}'
        for text in ("true", "0.5", '"x"')
    ],
)
def test_a_damaged_note(run: Path, data: Path, text: str) -> None:
    (run / FILE).write_text(text)
    with pytest.raises(UserError, match=r"data\.json is damaged"):
        go_on(run, data, str(data))
