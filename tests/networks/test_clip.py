"""A CLIP from a folder: vectors equal those of transformers' own model, step by step, and folders that are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from fewstep.errors import UserError
from fewstep.networks import hub_folders
from fewstep.networks.clip import load_clip
from tests.tiny_models import MAX_TOKENS, tiny_clip_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip_folder(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def pictures() -> list[Image.Image]:
    """Wide, tall and grey ones."""
    random = np.random.default_rng(0)
    shapes = [(30, 44, 3), (50, 26, 3), (24, 24)]
    return [Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


def by_hand(picture: Image.Image) -> np.ndarray:
    """What CLIP's paper and released code do with a picture: bicubic to 24, central square, CLIP's mean and deviation."""
    picture = picture.convert("RGB")
    width, height = picture.size
    short = min(width, height)
    picture = picture.resize((int(24 * width / short), int(24 * height / short)), Image.Resampling.BICUBIC)
    left, top = (picture.size[0] - 24) // 2, (picture.size[1] - 24) // 2
    pixels = np.asarray(picture.crop((left, top, left + 24, top + 24))).astype(np.float64) / 255
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return ((pixels - mean) / deviation).transpose(2, 0, 1)


def test_vectors_are_those_of_the_model(folder: Path) -> None:
    clip = load_clip(folder)
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = torch.from_numpy(np.stack([by_hand(one) for one in pictures()])).float()
    texts = ["red cat", "a dog", "cat"]
    tokens = [CLIPTokenizer.from_pretrained(folder)(text).input_ids for text in texts]
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)
        read = torch.cat(  # each alone, so without padding
            [model.text_projection(model.text_model(torch.tensor([row])).pooler_output) for row in tokens]
        )
    torch.testing.assert_close(clip.of_pictures(pictures()), seen / seen.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.of_texts(texts), read / read.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)
    assert (seen[0] - seen[1]).abs().max() > 0.01
    assert (clip.max_tokens, clip.shape) == (MAX_TOKENS, (2, 32, 8))
    assert clip.num_tokens("red cat") == len(tokens[0])


def test_long_texts_are_cut(folder: Path) -> None:
    clip = load_clip(folder)
    long = "cat " * 100
    assert clip.num_tokens(long) > clip.max_tokens
    torch.testing.assert_close(clip.of_texts([long]), clip.of_texts(["cat " * 200]))


def change(name: str, **values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        whole = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(whole | values))

    return spoil


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (change("config.json", model_type="siglip"), "is no CLIP: its config.json has model_type 'siglip'"),
        (change("config.json", auto_map={"AutoModel": "evil.Model"}, model_type="evil"), "model_type 'evil', not 'clip'"),
        (remove("config.json"), "config.json"), (remove("model.safetensors"), "cannot be loaded"),
        (cut_weights, "cannot be loaded"), (change("config.json", projection_dim=21), "holds another network"),
        (remove("preprocessor_config.json"), "has no preprocessor_config.json"),
        (change("preprocessor_config.json", image_processor_type="EvilProcessor"), "names EvilProcessor, not one of CLIPImage"),
        (change("preprocessor_config.json", crop_size={"height": 32, "width": 32}), "pictures of 32x32, the network takes 24x24"),
        (change("preprocessor_config.json", image_mean="x"), "fits no picture"),
        (change("preprocessor_config.json", image_std=[0, 0, 0]), "fits no picture|no numbers"),
        (change("vocab.json", more=9999), "token of number 9999, its network knows"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(own: Path, spoil: Callable[[Path], None], words: str) -> None:
    spoil(own)
    with pytest.raises(UserError, match=words) as error:
        load_clip(own)
    assert str(own) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_without_a_folder() -> None:
    with pytest.raises(
        UserError, match=r"nowhere is neither a folder nor a hub id .* of a CLIP, e\.g\. openai/clip-vit"
    ):
        load_clip("nowhere")


def test_hub_ids_are_fetched_without_pickles_and_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.extend([name, *allow_patterns])
        return str(folder)

    monkeypatch.setattr(hub_folders.huggingface_hub, "snapshot_download", fetch)
    assert load_clip("openai/clip").shape == (2, 32, 8)
    assert asked[0] == "openai/clip"
    assert not [pattern for pattern in asked if pattern.endswith((".bin", ".py", "*"))]
