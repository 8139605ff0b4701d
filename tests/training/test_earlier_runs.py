"""Run folders of earlier versions go on: their settings and data have other names there."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fewstep.distillation.start import refuse_other_memory
from fewstep.errors import UserError
from fewstep.evaluation.report.run_curves import _watch_notes
from fewstep.evaluation.report.run_files import read_run
from fewstep.export.model_card import _best_figure
from fewstep.formats.model_folder import ModelCard
from fewstep.networks.adapters import LoraShape
from fewstep.settings import TrainSettings, parse_settings
from fewstep.training.run_data import FILE
from fewstep.training.run_folder import claim_run_folder, release
from fewstep.training.text_data import open_latents

EARLIER: dict[str, Any] = {
    "memory": {"mode": "shared_base", "lora_rank": 4, "lora_alpha": 16.0, "frozen_precision": "bf16", "teacher": "sharded"},
    "losses": {"gan_generator_weight": 3e-3, "gan_discriminator_weight": 1e-2, "min_level_index": 20, "max_level_index": 980},
    "optimizer": {"generator_lr": 1e-5, "fake_score_lr": 4e-5},
    "run": {"sample_every": 50, "sample_images": 9},
    "best": {"features": "f", "reference": "r.npz", "num_images": 500},
}  # fmt: skip


def latents(folder: Path) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text('{"complete": true, "shards": []}')
    (folder / "latents_000.safetensors").write_bytes(b"some")
    return folder


def test_a_run_with_latents_goes_on_and_notices_others(tmp_path: Path) -> None:
    place, run = latents(tmp_path / "latents"), tmp_path / "run"
    values = {**EARLIER, "data": {"latents": str(place), "images": "", "prompts": ""}}
    settings = parse_settings(TrainSettings, values, "test")
    claim_run_folder(settings, run)
    release(run)
    noted = json.loads((run / FILE).read_text())
    assert noted["data.images"]["num_files"] == 2  # whole, not as pictures
    (run / FILE).write_text(json.dumps({"data.latents": noted["data.images"]}))
    (run / "settings.json").write_text(json.dumps(values))
    claim_run_folder(settings, run)
    release(run)
    (run / FILE).write_text(json.dumps({"data.latents": noted["data.images"]}))
    (place / "latents_000.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=r"data\.images=.*holds other files than this run began with"):
        claim_run_folder(settings, run)


def test_a_generator_starts_from_a_run_of_earlier_settings(tmp_path: Path) -> None:
    """Rank and alpha are read from either spelling, and compared."""
    shape = LoraShape(4, 16.0, (), 0.0)
    role = SimpleNamespace(shared=SimpleNamespace(lora=shape))
    roles: Any = SimpleNamespace(generator=role, fake_score=role)
    for memory in (EARLIER["memory"], {"mode": "shared_base", "lora": [4, 16.0]}):
        (tmp_path / "settings.json").write_text(json.dumps({"memory": memory}))
        refuse_other_memory(tmp_path, roles)
    for memory in ({**EARLIER["memory"], "lora_alpha": 8.0}, {"mode": "shared_base", "lora": [4, 8.0]}):
        (tmp_path / "settings.json").write_text(json.dumps({"memory": memory}))
        with pytest.raises(UserError, match=r"memory\.lora was \[4, 8\.0\] in that run and is \[4, 16\.0\] here"):
            refuse_other_memory(tmp_path, roles)


@pytest.mark.parametrize(
    "written", [EARLIER, {"run": {"samples": [50, 9]}, "best": {"files": ["f", "r.npz"], "num_images": 500}}]
)
def test_reports_and_cards_read_both(tmp_path: Path, written: dict[str, Any]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "images_per_second": 2.0}\n')
    (tmp_path / "best.json").write_text('[{"step": 7, "frechet_distance": 3.5}]')
    (tmp_path / "settings.json").write_text(json.dumps(written))
    run = read_run(tmp_path)
    assert run.settings["run.samples"] == [50, 9]
    assert "500 images, features f, reference r.npz, seed 1" in _watch_notes(run, "best.json", several=False)[0]
    card = ModelCard(role="generator", made_with={"settings": written, "num_steps": 7})
    found = _best_figure([{"step": 7, "frechet_distance": 3.5}], card)
    assert found == [("Frechet distance at step 7 (500 images, features f)", "3.500")]


def test_pictures_are_no_latents(tmp_path: Path) -> None:
    """`data.images` of a text-to-image run; what makes latents of them is said."""
    settings = parse_settings(TrainSettings, {"data": {"images": str(tmp_path)}, "teacher": {"path": "MODEL"}}, "test")
    teacher: Any = None
    with pytest.raises(UserError, match=r"is no folder of latents.*`fewstep prepare latents MODEL FOLDER --images"):
        open_latents(settings, teacher)
