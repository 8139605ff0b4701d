"""What the README and docs tell people to type exists and parses; the Python example runs."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from fewstep.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """Every `fewstep ...` line of a code block, and every inline `fewstep ...` of a table."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```(?:bash|sh|)\n(.*?)```", text, flags=re.DOTALL):
            found += [line.split("#")[0].strip() for line in block.splitlines() if line.strip().startswith("fewstep ")]
        found += re.findall(r"`(fewstep (?:train|pretrain|evaluate|sample|prepare)[^`]*)`", text)
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_documented_commands_exist(command: str) -> None:
    """Each names a real command, real options and, for recipes, a real file."""
    arguments = [part for part in shlex.split(command)[1:] if part not in ("[key=value...]",)]
    known = typer.main.get_command(app)
    path = []
    while arguments and hasattr(known, "commands") and arguments[0] in known.commands:
        known = known.commands[arguments[0]]
        path.append(arguments.pop(0))
    assert path, f"{command}: no such command"
    options = {option for parameter in known.params for option in parameter.opts}
    for part in arguments:
        if part.startswith("--"):
            assert part.split("=")[0] in options, f"{command}: no option {part}"
        if part.startswith("recipes/"):
            assert (ROOT / part).is_file(), f"{command}: {part} does not exist"


def test_help_of_every_command() -> None:
    runner = CliRunner()
    for name in ("quickstart", "pretrain", "train", "sample", "evaluate", "report", "settings", "prepare"):
        result = runner.invoke(app, [name, "--help"])
        assert result.exit_code == 0, name


@pytest.mark.slow
def test_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's Python block, as it stands."""
    import sys

    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    result = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "clothes.png").stat().st_size > 200  # one small grey picture


def test_make_targets_of_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))}
    assert named <= targets


def test_settings_page_is_up_to_date() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == module.render(), "run `make docs`"
