"""Fingerprints tell models apart, and two saved copies of one model not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fewstep.errors import UserError
from fewstep.formats import fingerprints
from fewstep.formats.fingerprints import text_fingerprint, vae_fingerprint
from tests.tiny_models import tiny_sdxl_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl_folder(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(path: Path) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.slow
def test_a_copy_is_the_same_model(model: Path, copy: Path) -> None:
    for component in ("text_encoder", "text_encoder_2", "vae"):
        changes = {"_name_or_path": "elsewhere", "_diffusers_version": "9", "transformers_version": "9", "dtype": "x"}
        edit_json(copy / component / "config.json", **changes)
        (copy / component / "model.fp16.safetensors").write_bytes(b"a variant that is not loaded")
    edit_weights(copy / "unet/diffusion_pytorch_model.safetensors")
    assert text_fingerprint(copy) == text_fingerprint(model)
    assert vae_fingerprint(copy) == vae_fingerprint(model) == vae_fingerprint(model / "vae")
    assert text_fingerprint(model) != vae_fingerprint(model)


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("part", ["weights", "config"])
def test_other_text_encoders(model: Path, copy: Path, component: str, part: str) -> None:
    if part == "weights":
        edit_weights(copy / component / "model.safetensors")
    else:
        edit_json(copy / component / "config.json", hidden_act="gelu")
    assert text_fingerprint(copy) != text_fingerprint(model)
    assert vae_fingerprint(copy) == vae_fingerprint(model)


def test_a_text_encoder_less(model: Path, copy: Path) -> None:
    edit_json(copy / "model_index.json", text_encoder_2=[None, None])
    assert text_fingerprint(copy) != text_fingerprint(model)


def test_another_vae(model: Path, copy: Path) -> None:
    edit_json(copy / "vae/config.json", scaling_factor=1.0)
    assert vae_fingerprint(copy) != vae_fingerprint(model)
    assert text_fingerprint(copy) == text_fingerprint(model)


@pytest.mark.parametrize("place", [0, 40, 79])
def test_large_files_are_sampled(model: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """A change is seen at the start, in a sampled block in the middle and at the end; the rest is not read."""
    monkeypatch.setattr(fingerprints, "_NUM_BLOCKS", 3)
    monkeypatch.setattr(fingerprints, "_BLOCK_BYTES", 16)
    path = copy / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(bytes(80))
    before = vae_fingerprint(copy)
    content = bytearray(80)
    content[place] = 1
    path.write_bytes(content)
    assert vae_fingerprint(copy) != before
    path.write_bytes(bytes(81))
    assert vae_fingerprint(copy) != before


def test_what_is_missing_is_named(model: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model_index\.json cannot be read .*; give a diffusers folder"):
        text_fingerprint(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        vae_fingerprint(tmp_path)
    (copy / "text_encoder_2/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"text_encoder_2 holds no weights as safetensors; download the model again"):
        text_fingerprint(copy)
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(UserError, match=r"copy/text_encoder cannot be read"):
        text_fingerprint(copy)
    (copy / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="has no text encoders; give a text-to-image model"):
        text_fingerprint(copy)
