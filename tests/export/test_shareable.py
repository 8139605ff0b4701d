"""An export tells how it was made, not where."""

import json
from pathlib import Path

import pytest

from fewstep.backbones.adapters import LoraShape
from fewstep.export.export import ExportOptions, export_generator
from fewstep.export.shareable import without_local_paths
from fewstep.formats.model_folder import ModelCard
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


def test_a_pushed_export_names_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "home-of-ann"
    run = write_run(
        secret, "sd", lora=LoraShape(rank=4), made_with={"settings": {"teacher": {"path": str(secret / "teacher")}}}
    )
    out = export_generator(run, tmp_path / "out", ExportOptions("lora", num_samples=0, repo="ann/emoji"))
    for path in (path for path in out.rglob("*") if path.is_file()):
        assert b"home-of-ann" not in path.read_bytes(), path
    assert json.loads((out / "scheduler/scheduler_config.json").read_text())
