"""An export tells how it was made, not where."""

import json
from pathlib import Path
from typing import Any

import pytest

from fewstep.export.export import KINDS, ExportOptions, export_generator
from fewstep.export.shareable import shareable_base, without_local_paths
from fewstep.formats.model_folder import ModelCard, write_model_folder
from fewstep.networks.adapters import LoraShape
from tests.conftest import golden_denoiser
from tests.export.text_generators import write_run


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/ann/models/sdxl", "sdxl"), ("~/sdxl", "sdxl"), ("../sdxl/", "sdxl"), ("./data.txt", "data.txt"),
        ("C:\\Users\\ann\\sdxl", "sdxl"), ("stabilityai/sdxl", "stabilityai/sdxl"), ("bundled:emoji-sd", "bundled:emoji-sd"),
        ("a red fox", "a red fox"), ("", ""),
        ("/home/ann/.cache/huggingface/hub/models--org--name/snapshots/0123abcd", "org/name"),
    ],
)  # fmt: skip
def test_local_paths_lose_their_folders(text: str, kept: str) -> None:
    card = ModelCard("generator", made_with={"settings": {"teacher": {"path": text}, "seeds": [1, text]}}, base=text)
    found = without_local_paths(card, keep_base=False)
    assert found.base == kept
    assert found.made_with == {"settings": {"teacher": {"path": kept}, "seeds": [1, kept]}}
    assert without_local_paths(card, keep_base=True).base == text


def leaking_teacher(teacher: Path) -> None:
    """Configs as transformers and diffusers write them for a model that was loaded from a local folder."""
    for name in ("unet/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json", "vae/config.json"):
        config = json.loads((teacher / name).read_text(encoding="utf-8"))
        config["_name_or_path"] = str(teacher)
        if name.startswith("text_encoder"):  # transformers nests its configs
            config |= {"name_or_path": "org/name", "nested": {"_name_or_path": str(teacher)}}
        (teacher / name).write_text(json.dumps(config), encoding="utf-8")
    index = json.loads((teacher / "model_index.json").read_text(encoding="utf-8"))
    (teacher / "model_index.json").write_text(json.dumps({**index, "_name_or_path": str(teacher)}), encoding="utf-8")


@pytest.mark.parametrize("kind", [*KINDS, "class-conditional diffusers"])
def test_a_pushed_export_names_no_folder_of_this_machine(tmp_path: Path, kind: str) -> None:
    """Every byte of every file; a fine-tune in a local folder is known by its last name."""
    secret = tmp_path / "home-of-ann"
    facts: dict[str, Any] = {
        "made_with": {"settings": {"teacher": {"path": str(secret / "teacher")}, "data": [str(secret / "x.txt")]}}
    }
    if kind in ("edm", "class-conditional diffusers"):
        denoiser, card = (
            golden_denoiser("adm")[0],
            ModelCard("generator", (999,), base=str(secret / "teacher"), **facts),
        )
        write_model_folder(secret / "run/generator", denoiser.describe(), denoiser.state_dict(), card)
        run = secret / "run"
    else:
        run = write_run(secret, "sd", lora=LoraShape(rank=4) if "lora" in kind else None, **facts)
        leaking_teacher(secret / "teacher")
    options = ExportOptions(kind.split()[-1], num_samples=1, prompts=("cat",), repo="ann/emoji", device="cpu")
    out = export_generator(run, tmp_path / "out", options)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"README.md", "samples.png"} < {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert b"home-of-ann" not in content, path
        assert str(tmp_path).encode() not in content, path


def test_an_export_for_this_machine_finds_its_base_in_the_card_only(tmp_path: Path) -> None:
    """Without --push the card names the base's folder; a single file, made to be passed on, never does."""
    run = write_run(tmp_path / "home-of-ann", "sd")
    leaking_teacher(tmp_path / "home-of-ann/teacher")
    out = export_generator(run, tmp_path / "file", ExportOptions("single-file", num_samples=0, device="cpu"))
    assert b"home-of-ann" not in (out / "file.safetensors").read_bytes()
    out = export_generator(run, tmp_path / "folder", ExportOptions("diffusers", num_samples=0, device="cpu"))
    assert json.loads((out / "fewstep.json").read_text())["base"] == str(tmp_path / "home-of-ann/teacher")
    copied = json.loads((out / "text_encoder/config.json").read_text())
    assert (copied["_name_or_path"], copied["nested"]) == ("teacher", {"_name_or_path": "teacher"})
    assert copied["name_or_path"] == "org/name"
    original = json.loads((tmp_path / "home-of-ann/teacher/text_encoder/config.json").read_text())
    assert copied.keys() == original.keys()


def test_a_local_folder_that_looks_like_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shareable_base("ann/sdxl") == "ann/sdxl"
    (tmp_path / "ann/sdxl").mkdir(parents=True)
    assert shareable_base("ann/sdxl") == "sdxl"
