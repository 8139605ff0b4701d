"""A stand-in for the shipped emoji set: generated pictures, tiny teachers, everything else made by the real script."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from tests.tiny_models import tiny_sd_folder, tiny_sdxl_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import bundle_emoji as script

TEACHER_STEPS = 4
RECIPE = Path(__file__).parents[1] / "src/fewstep/assets/emoji/recipe.toml"

TRAIN = {f"{name}, {group}": "x" for group in ("food", "flags") for name in ("red cat", "a dog", "cat", "dog", "bird")}
HELD_OUT = {f"{name}, {group}": "x" for group in ("food", "flags") for name in ("blue cat", "red dog")}


def write_data(folder: Path) -> Path:
    """Two noisy 64x64 pictures a text, food darker than flags."""
    folder.mkdir()
    random = np.random.default_rng(0)
    lines = []
    for number, text in enumerate([*TRAIN, *HELD_OUT] * 2):
        brightness = 80 if text.endswith("food") else 170
        pixels = np.clip(random.normal(brightness, 30, (64, 64, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": text, "group": "x"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_run(folder: Path) -> Path:
    """Tiny teachers of 64x64 pictures, as train_emoji_teacher.py leaves them."""
    for name, make in (("sd", tiny_sd_folder), ("sdxl", tiny_sdxl_folder)):
        make(folder / name)
        config = folder / name / "unet/config.json"
        values = json.loads(config.read_text())
        config.write_text(json.dumps(values | {"sample_size": values["sample_size"] * 4}))
        (folder / name / "split.json").write_text(json.dumps({"train": TRAIN, "held_out": HELD_OUT}))
    return folder


def made_once(factory: pytest.TempPathFactory) -> Path:
    """The folder of one `bundle` for all tests, whichever process comes first; nobody writes into it."""
    root = factory.getbasetemp()
    work = (root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root) / "emoji-bundle"
    with FileLock(f"{work}.lock"):
        if not (work / "done").is_file():
            bundle(work)
            (work / "done").touch()
    return work


def bundle(work: Path, *options: str) -> Path:
    """Run the script; returns the folder that stands for src/fewstep/assets."""
    target = work / "assets/emoji"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(RECIPE, target / "recipe.toml")
    data = work / "data" if (work / "data").is_dir() else write_data(work / "data")
    run = work / "run" if (work / "run").is_dir() else write_run(work / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "ASSETS", target)
        patch.setattr(script, "NUM_STEPS", TEACHER_STEPS)
        script.main([str(data), str(run), "--passes", "8", "--teacher-images", "6", *options])
    return target.parent
