"""Hub ids as teachers: which files are asked for, and what a user reads without a network. Nothing is fetched."""

import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers.pipelines import pipeline_utils

import fewstep
from fewstep.errors import UserError
from fewstep.families.diffusers_folder import resolve_model_folder
from tests.tiny_models import tiny_sd2_folder

OTHER_FORMATS = (
    "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.fp16.bin",
    "unet/diffusion_flax_model.msgpack", "unet/diffusion_pytorch_model.non_ema.safetensors", "vae/diffusion_pytorch_model.bin",
    "text_encoder/pytorch_model.bin", "text_encoder/model.fp16.safetensors", "text_encoder/flax_model.msgpack",
    "unet/model.onnx", "v2-1_768-ema-pruned.ckpt", "v2-1_768-ema-pruned.safetensors", "pytorch_model.bin",
)  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """One repository, me/model: a tiny Stable Diffusion 2 among files of other formats. Notes what is asked for."""
    model = tiny_sd2_folder(tmp_path / "model")
    own = [str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()]
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "model_index.json").write_bytes((model / "model_index.json").read_bytes())
    notes = SimpleNamespace(own=own, model=model, asked=None)

    def snapshot_download(name: str, **options: Any) -> str:
        notes.asked = {"name": name, **options}
        return str(model)

    siblings = [SimpleNamespace(rfilename=name) for name in (*own, *OTHER_FORMATS)]
    monkeypatch.setattr(pipeline_utils, "model_info", lambda *_, **__: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(pipeline_utils, "hf_hub_download", lambda *_, **__: str(cache / "model_index.json"))
    monkeypatch.setattr(pipeline_utils, "snapshot_download", snapshot_download)
    return notes


def test_safetensors_alone_are_fetched(hub: SimpleNamespace) -> None:
    assert resolve_model_folder("me/model") == hub.model
    assert hub.asked["name"] == "me/model"

    def wanted(name: str) -> bool:
        allowed, ignored = hub.asked["allow_patterns"], hub.asked["ignore_patterns"]
        kept = any(fnmatch.fnmatch(name, pattern) for pattern in allowed)
        return kept and not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)

    assert [name for name in OTHER_FORMATS if wanted(name)] == []
    assert [name for name in hub.own if not wanted(name)] == []  # nothing of the model itself is left out
    assert {
        "unet/diffusion_pytorch_model.safetensors",
        "tokenizer/vocab.json",
        "scheduler/scheduler_config.json",
    } <= set(hub.own)


def test_a_hub_id_is_a_teacher(hub: SimpleNamespace) -> None:
    teacher = fewstep.load_teacher("me/model", device="cpu")
    assert (teacher.base, teacher.folder) == ("me/model", hub.model)


def test_without_a_network_it_is_one_sentence() -> None:
    """The tests run with HF_HUB_OFFLINE=1 and this model is in no cache."""
    with pytest.raises(UserError) as error:
        resolve_model_folder("nobody/no-such-model-of-fewstep-tests")
    assert str(error.value).startswith(
        "nobody/no-such-model-of-fewstep-tests is not a local folder and cannot be fetched from the hub ("
    )
    assert str(error.value).endswith("check the name and the network, or download it and give the folder")
    assert "\n" not in str(error.value)
    assert "it is not in the cache" in str(error.value)


def test_an_error_without_words_is_named(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise TimeoutError

    monkeypatch.setattr(pipeline_utils, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"cannot be fetched from the hub \(TimeoutError\); check the name"):
        resolve_model_folder("me/model")


@pytest.mark.parametrize("source", ["./me/model", "/me/model", "~/model", "a/b/c", "model"])
def test_a_path_is_never_looked_for_on_the_hub(hub: SimpleNamespace, source: str) -> None:
    with pytest.raises(UserError, match=r"does not exist and is not a hub id \(org/name\)"):
        resolve_model_folder(source)
    assert hub.asked is None
