"""DINOv2 features equal transformers' own; other folders, and code in a folder, are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from fewstep.errors import UserError
from fewstep.evaluation.feature_cache import network_digest
from fewstep.evaluation.features import load_features
from tests.cli.test_main import fewstep


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dino", safe_serialization=True)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessorPil(**size).save_pretrained(tmp_path / "dino")
    return tmp_path / "dino"


def test_features_are_those_of_the_class_token(folder: Path) -> None:
    network = load_features(str(folder))
    images = torch.rand(3, 1, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = network(images)
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).numpy()
    pictures = [Image.fromarray(np.repeat(one[0][..., None], 3, 2)) for one in pixels]
    model, processor = Dinov2Model.from_pretrained(folder).eval(), BitImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        expected = model(**processor(pictures, return_tensors="pt")).last_hidden_state[:, 0]
    assert found.shape == (3, 32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert network.name.startswith("DINOv2 ViT of 2 layers of 32/14, sha256 ")


def test_how_pictures_are_fitted_is_part_of_what_features_are_kept_under(folder: Path) -> None:
    before = network_digest(load_features(str(folder)))
    path = folder / "preprocessor_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "size": {"shortest_edge": 40}}), encoding="utf-8")
    assert network_digest(load_features(str(folder))) != before


def test_other_folders_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    changed = {**config, "auto_map": {"AutoModel": "evil.Model"}}
    (folder / "evil.py").write_text("raise SystemExit('code of the folder ran')", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    load_features(str(folder))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "vit"}), encoding="utf-8")
    with pytest.raises(UserError, match="model_type 'vit', not dinov2 or dinov2_with_registers"):
        load_features(str(folder))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"has no preprocessor_config\.json"):
        load_features(str(folder))


@pytest.mark.slow
def test_a_distance_in_dinov2s_features_says_so(folder: Path, teacher_folder: Path, pictures: Path) -> None:
    answer = fewstep(
        "evaluate", str(teacher_folder), "--features", str(folder), "--images", str(pictures), "--num-images", "8",
        "--teacher-steps", "1", "--device", "cpu", "--precision", "fp32", "--no-cache",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "features DINOv2 ViT of 2 layers of 32/14, sha256" in answer.out
