"""Small promises of the repository that nothing else checks."""

import ast
import re
import statistics
import tomllib
from pathlib import Path

import pytest

from tests.conftest import END_TO_END, FAST, pytest_ignore_collect
from tests.house_counts import COUNTS, ROOT, SOURCES, STEP, Count, functions, sizes, table, unused


@pytest.mark.slow
def test_no_unpickling_in_src() -> None:
    """No pickle.load, and torch.load only with weights_only=True."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            assert (owner, node.func.attr) not in {("pickle", "load"), ("pickle", "loads")}, path
            if (owner, node.func.attr) == ("torch", "load"):
                safe = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
                assert safe, f"{path}:{node.lineno}"


@pytest.mark.slow
def test_every_module_says_why_it_exists() -> None:
    assert not [path for path in SOURCES if ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None]


def test_ci_runs_what_the_readme_names() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for target in ("lint", "types", "test"):
        assert re.search(rf'make VENV="\$VENV" {target}$', script, flags=re.MULTILINE)


def test_the_matrix_of_diffusers_versions_names_tests_that_exist() -> None:
    script = (ROOT / ".ci/diffusers_matrix").read_text(encoding="utf-8")
    named = re.findall(r"tests/[\w/]+\.py", script)
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_what_the_fast_tests_leave_out_exists() -> None:
    assert [name for name in END_TO_END if not (ROOT / "tests" / name).exists()] == []


@pytest.mark.parametrize(
    ("place", "left_out"),
    [
        ("app", True),
        ("app/test_page.py", True),
        ("cli/test_sample.py", True),
        ("cli", False),
        ("cli/test_main.py", False),
    ],
)
def test_the_fast_tests_do_not_import_what_they_leave_out(
    place: str, left_out: bool, pytestconfig: pytest.Config
) -> None:
    """And every other selection imports everything; the target of the Makefile is the selection that is meant."""
    with pytest.MonkeyPatch.context() as patch:
        for words in (FAST, "not long", "long or not long"):
            patch.setattr(pytestconfig.option, "markexpr", words)
            ignored = pytest_ignore_collect(ROOT / "tests" / place, pytestconfig)
            assert ignored is (True if left_out and words == FAST else None)
    assert f"-m '{FAST}'" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_torch_is_a_range_in_the_metadata_and_a_pin_in_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "torch>=2.8" in project["dependencies"]
    assert re.search(
        r"^torch==\d+\.\d+\.\d+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert project["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").strip().startswith("Apache License")


def test_the_notice_names_what_ships() -> None:
    """Every folder of pictures, with its owners; copies of the MIT texts lie beside them."""
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for folder in (path for path in (ROOT / "src/fewstep/assets").iterdir() if path.is_dir()):
        assert f"src/fewstep/assets/{folder.name}/PROVENANCE.md" in notice
    for owner in ("Copyright 2017 Zalando SE", "Copyright Google LLC", "Copyright (c) 2013 Cal Henderson"):
        assert owner in notice


def test_recipes_point_at_files_that_exist() -> None:
    for path in (ROOT / "recipes").glob("*.toml"):
        for name in re.findall(r"(?:docs|src)/[\w./-]+\.(?:md|py|toml)", path.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{path.name} points at {name}"


def test_nobody_asks_a_model_for_its_class() -> None:
    """Classes or text, teacher or generator: the model says it, and one place tells a path from a hub id."""
    asked = re.compile(
        r"isinstance\(.*\b(Teacher|Generator|TextModel|TextTeacher|TextGenerator|EDMDenoiser)\b|load_class_|AnyTeacher"
        r"|AnyModel|AnyGenerator|HasTexts|is_text\b"
    )
    guess = re.compile(r"""(source|images|path|base|name)\)?\.count\("/"\)""")
    for path in SOURCES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            own = path.parent.name == "edm" and "EDMDenoiser" in line  # a family knows its network
            assert own or not asked.search(line), f"{path}:{number} {line.strip()}"
            assert not guess.search(line), f"{path}:{number} guesses what Source.parse knows"
    names = {path.name for path in SOURCES if path.parent.name == "models"}
    assert not names & {"text_model.py", "prompt_table.py"}


@pytest.mark.parametrize("count", COUNTS, ids=lambda count: count.what[:40])
def test_the_house_keeps_its_counts(count: Count) -> None:
    """What each was before the house was rebuilt stands beside it in tests/house_counts.py."""
    found = count.found()
    assert len(found) <= count.limit, found


@pytest.mark.slow
def test_sizes() -> None:
    assert statistics.median(sizes().values()) < 130
    assert len(STEP) == 8
    assert all((ROOT / "src/fewstep" / name).is_file() for name in STEP)
    assert max(lines for _, lines in functions()) <= 60


def test_the_counters_see_what_they_should(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each promise is broken once, in a module of its own, and noticed."""
    folder = tmp_path / "src/fewstep"
    folder.mkdir(parents=True)
    (folder / "text_broken.py").write_text(
        "import copy, unittest.mock\nfrom fewstep.families.edm.denoiser import EDMDenoiser\n"
        "def nobody_calls_me(x, num_steps=18):\n    if isinstance(x, Teacher):\n        copy.deepcopy(x).backward(x)\n"
        "    x.__dict__['a'] = set(x.state_dict())\n    name.count('/')\n    g = torch.autograd.grad(x)\n"
        "    return base.count('/')\n" + "    x = 1\n" * 400
    )
    (folder / "broken.py").write_text("")
    monkeypatch.setattr("tests.house_counts.ROOT", tmp_path)
    monkeypatch.setattr("tests.house_counts.SOURCES", sorted(folder.rglob("*.py")))
    (tmp_path / "pyproject.toml").write_text("")
    for count in COUNTS:
        assert count.found(), count.what
    assert unused() == ["text_broken.py nobody_calls_me"]


@pytest.mark.slow
def test_docs_house_is_the_table() -> None:
    """The printed page says what is true today, but for the sizes, which move with every change."""
    page = (ROOT / "docs/house.md").read_text(encoding="utf-8")
    for row in table().splitlines()[: 2 + len(COUNTS)]:
        assert row in page, f"{row}: python -m tests.house_counts prints the table of docs/house.md"


@pytest.mark.slow
def test_no_function_is_called_with_a_row_of_values() -> None:
    """Many options are one object, or have their names at the call; gradio alone hands over a page's fields in a row."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (path.name, node.name) != ("page.py", "generate"):
                names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
                assert len([name for name in names if name not in ("self", "cls")]) <= 8, f"{path}: {node.name}"


def test_a_command_is_a_file() -> None:
    folder = ROOT / "src/fewstep/cli"
    assert len((folder / "main.py").read_text(encoding="utf-8").splitlines()) < 150
    names = {path.stem for path in folder.glob("*.py")}
    assert {"sample", "evaluate", "export", "app", "quickstart", "convert", "report", "train", "pretrain"} <= names
    assert {"prepare", "settings"} <= names
    assert not {"commands", "commands_text"} & names


def test_the_readme_shows_the_rooms_that_there_are() -> None:
    """Every room of the tree exists, and every room is in the tree."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"```\nsrc/fewstep/\n(.*?)```", text, flags=re.DOTALL)
    assert tree is not None
    shown = re.findall(r"^  ([a-z_]+(?:/|\.py)(?:, [a-z_]+(?:/|\.py))*)", tree[1], flags=re.MULTILINE)
    named = {name for line in shown for name in line.split(", ")}
    rooms = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / "src/fewstep").iterdir()
        if not path.name.startswith("__") and path.name != "py.typed"
    }
    assert named == rooms


def test_nobody_is_sent_to_a_distribution_that_does_not_exist() -> None:
    """fewstep is not on PyPI: a clone or a wheel is what there is."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *SOURCES]
    wrong = re.compile(r"pip install [^\n`]*[' ]fewstep\b")
    assert not [path.name for path in pages if wrong.search(path.read_text(encoding="utf-8"))]
