"""What ships for the text quick start, made from generated pictures and tiny teachers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fewstep.data.prompts import load_prompts
from fewstep.errors import UserError
from fewstep.evaluation.bench import load_bench
from fewstep.evaluation.measurement import Measurement
from tests.emoji_assets import HELD_OUT, TEACHER_STEPS, TRAIN, bundle, made_once, script


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory)


def test_prompts_and_held_out_pictures(work: Path) -> None:
    bench = load_bench(work / "assets/emoji")
    assert bench.prompts != list(TRAIN)  # shuffled
    assert sorted(bench.prompts) == sorted(TRAIN)
    assert sorted(bench.held_out) == sorted(HELD_OUT)
    assert load_prompts(work / "assets/emoji/held_out.parquet", "group") == bench.held_out_groups
    rows = [json.loads(line) for line in (work / "data/metadata.jsonl").read_text().splitlines()]
    for text, image in zip(bench.held_out, bench.held_out_images, strict=True):
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        files = [row["file_name"] for row in rows if row["text"] == text]
        assert any(np.array_equal(pixels, np.asarray(Image.open(work / "data" / name))) for name in files)


def test_the_classifier_learned_from_training_pictures(work: Path) -> None:
    """Brightness tells the two groups apart, on pictures it has not seen too; chance is a half."""
    bench = load_bench(work / "assets/emoji")
    assert bench.classifier.class_names == ("flags", "food")
    assert bench.reference.num_images == len(TRAIN)
    found = json.loads((work / "assets/emoji/feature_measurement.json").read_text())
    assert found["held_out"]["num_images"] == len(HELD_OUT)
    real = bench.real()
    assert {name: real[name] for name in ("agreement", "balanced", "shuffled")} == pytest.approx(
        {name: found["held_out"][name] for name in ("agreement", "balanced", "shuffled")}
    )
    assert real["held_out_distance"] == pytest.approx(found["floor"], rel=1e-4)
    assert real.get("retrieval") is None


def test_teachers_are_copied_and_measured(work: Path) -> None:
    figures = json.loads((work / "assets/emoji/teacher_measurement.json").read_text())
    for name in ("sd", "sdxl"):
        path = "unet/diffusion_pytorch_model.safetensors"
        copy, original = load_file(work / "assets/emoji" / name / path), load_file(work / "run" / name / path)
        assert all(torch.equal(copy[key], original[key]) for key in copy | original)
        found = Measurement.from_dict(figures[f"emoji-{name}"])
        assert (found.num_images, found.evaluations_per_image, found.values["agreement"].num_images) == (
            6,
            TEACHER_STEPS,
            4,
        )
        assert figures[f"emoji-{name}"]["guidance_scale"] == 4.0
        assert found.to_dict() == {key: figures[f"emoji-{name}"][key] for key in found.to_dict()}
        assert Measurement.from_dict(figures[f"emoji-{name}"]["on_curve"]).num_images == 6


def test_provenance_says_what_was_found(work: Path) -> None:
    text = (work / "assets/emoji/PROVENANCE.md").read_text()
    figures = json.loads((work / "assets/emoji/teacher_measurement.json").read_text())
    assert f"{figures['emoji-sdxl']['frechet_distance']:.3f} (6)" in text
    assert "python examples/bundle_emoji.py" in text
    assert "Apache License 2.0" in text
    assert "{" not in text


def test_too_much_to_ship_is_refused(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "LIMIT_BYTES", 1000)
    shutil.copytree(work, tmp_path / "work")
    with pytest.raises(UserError, match="is larger than 0 MB"):
        bundle(tmp_path / "work", "--only", "pictures")


def test_teachers_of_different_texts_are_refused(work: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("sd", "sdxl"):
        (run / name).mkdir(parents=True)
        (run / name / "split.json").write_text(json.dumps({"train": {name: "x"}, "held_out": {}}))
    with pytest.raises(UserError, match="were trained on different texts"):
        script.main([str(work / "data"), str(run)])
    with pytest.raises(UserError, match=r"train the teachers with examples/train_emoji_teacher\.py first"):
        script.main([str(work / "data"), str(tmp_path)])
