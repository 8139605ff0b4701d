"""What `pip wheel` makes of a clone works from a fresh folder: assets and templates are in it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_wheel_brings_everything(tmp_path: Path) -> None:
    clone, target = tmp_path / "clone", tmp_path / "target"
    shutil.copytree(ROOT / "src", clone / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, clone)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("fewstep-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    here = {path.relative_to(clone / "src").as_posix() for path in (clone / "src").rglob("*") if path.is_file()}
    here = {name for name in here if ".egg-info/" not in name}
    there = {path.relative_to(target).as_posix() for path in (target / "fewstep").rglob("*") if path.is_file()}
    assert there == here
    environment = {**os.environ, "PYTHONPATH": str(target)}
    shown = subprocess.run(
        [sys.executable, "-m", "fewstep", "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("fewstep ")
    place = subprocess.run(
        [sys.executable, "-c", "import fewstep; print(fewstep.__file__)"], cwd=tmp_path, env=environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert place.stdout.strip() == str(target / "fewstep/__init__.py")
