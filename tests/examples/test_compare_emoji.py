"""The comparison of emoji models: a picture with every prompt, a table with every model."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.errors import UserError
from fewstep.formats import bundled
from tests.cli.test_main import fewstep as run
from tests.emoji_assets import TEACHER_STEPS, made_once

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import compare_emoji as script

RECIPE = Path(__file__).parents[2] / "recipes/emoji_dmd2_4step_lora.toml"
SMALL = ("--num-images", "6", "--teacher-steps", "2", "--precision", "fp32")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A stand-in for what ships, and a run of two steps on it."""
    work, assets = tmp_path_factory.mktemp("compare"), made_once(tmp_path_factory) / "assets"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundled, "ASSETS", assets)
        answer = run(
            "train", RECIPE, "best.files=[]", "training.num_steps=2", "training.batch_size=2", "run.sample_images=2",
            "compute.device=cpu", f"run.folder={work / 'generator-run'}",
        )  # fmt: skip
        assert answer.code == 0, answer.err
    return assets, work / "generator-run"


def test_picture_and_table(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shipped figures for the teacher, measured ones for the generator; the picture changes with the seed."""
    monkeypatch.setattr(bundled, "ASSETS", made[0])
    models = ["bundled:emoji-sd", str(made[1])]
    script.main([*models, "--names", "teacher", "4 steps", "--out", str(tmp_path / "a/compared"), *SMALL])
    rows = re.findall(
        r"^\| (teacher|4 steps|real held-out pictures) \| (\S+) \|", capsys.readouterr().out, re.MULTILINE
    )
    assert rows == [("teacher", str(TEACHER_STEPS)), ("4 steps", "4"), ("real held-out pictures", "-")]
    found = json.loads((tmp_path / "a/compared.json").read_text())
    shipped = json.loads((made[0] / "emoji/teacher_measurement.json").read_text())["emoji-sd"]
    assert found["teacher"]["frechet_distance"] == shipped["frechet_distance"]
    assert found["4 steps"]["num_images"] == 6
    script.main(
        [
            *models,
            "--names",
            "teacher",
            "4 steps",
            "--out",
            str(tmp_path / "b"),
            "--seed",
            "1",
            *SMALL,
            "--held-out-seeds",
            "2",
        ]
    )
    assert re.search(r"^\| 4 steps \| 2 \| \d+\.\d+ ± \d+\.\d+ \|", capsys.readouterr().out, re.MULTILINE)
    followed = json.loads((tmp_path / "b.json").read_text())["teacher"]["held_out_seeds"]
    assert {name: len({*figures}) for name, figures in followed.items()}["held_out_distance"] == 2
    first, second = (np.asarray(Image.open(path)) for path in (tmp_path / "a/compared.png", tmp_path / "b.png"))
    assert first.shape == second.shape
    assert first.shape[1] == script.TEXT_WIDTH + 3 * (64 + script.GAP)
    assert (first[:, : script.TEXT_WIDTH] == second[:, : script.TEXT_WIDTH]).all()
    generator = slice(script.TEXT_WIDTH + 2 * (64 + script.GAP), None)
    assert (first[:, generator] != second[:, generator]).any()


def test_names_must_fit(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--names: 1 different names are needed"):
        script.main(["bundled:emoji-sd", "--names", "a", "b", "--out", str(tmp_path / "x")])
    with pytest.raises(UserError, match="--held-out-seeds=1: a spread takes two seeds or more"):
        script.main(["bundled:emoji-sd", "--held-out-seeds", "1", "--out", str(tmp_path / "x")])


def test_only_text_models(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bundled:fashion-mnist is not a text-to-image model"):
        script.main(["bundled:fashion-mnist", "--out", str(tmp_path / "x")])
    assert not list(tmp_path.iterdir())
