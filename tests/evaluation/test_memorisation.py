"""Nearest real pictures: copies are found and named, and a run without pictures to compare is refused."""

import json
from pathlib import Path

import pytest
import torch

from fewstep.errors import UserError
from fewstep.evaluation.features import SmallClassifier
from fewstep.evaluation.report.memorisation import memorisation_sections, nearest_real
from fewstep.evaluation.report.run_files import read_run
from fewstep.evaluation.report.sections import PromptCards, Table
from fewstep.formats.pixels import save_grid, save_picture
from tests.cli.test_main import fewstep


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of ten 8x8 pictures, whose fourth sample is the seventh of them, and which is asked for four samples."""
    torch.manual_seed(0)
    real, made = torch.rand(10, 3, 8, 8) * 2 - 1, torch.rand(4, 3, 8, 8) * 2 - 1
    made[3] = real[6]
    (tmp_path / "real").mkdir()
    for number, image in enumerate(real):
        save_picture(tmp_path / f"real/{number}.png", image, {})
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    save_grid(folder / "samples/generator_00000005.png", made, 4)
    (folder / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}')
    settings = {"data": {"images": str(tmp_path / "real"), "pairs": ""}, "run": {"sample_images": 4}}
    (folder / "settings.json").write_text(json.dumps(settings))
    SmallClassifier(3, 2, 8, name="mine").eval().save(tmp_path / "features")
    return folder


def test_distances_are_in_units_of_those_between_real_pictures() -> None:
    real = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0], [9.0, 0.0]])
    found = nearest_real(torch.tensor([[2.0, 1.0], [9.0, 0.0]]), real)
    assert found.rows.tolist() == [1, 3]
    assert found.ratios.tolist() == [0.5, 0.0]  # real ones are 2, 2, 2 and 5 apart
    with pytest.raises(UserError, match="half or more of the real pictures are there twice"):
        nearest_real(real, torch.zeros(3, 2))


def test_a_copy_comes_first_and_is_counted(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cards, table = memorisation_sections(read_run(run), str(tmp_path / "features"), device="cpu")
    assert isinstance(cards, PromptCards)
    assert cards.prompts[0] == "0.00 of the usual distance"
    assert torch.equal(cards.columns["sample"][0], cards.columns["nearest real picture"][0])
    assert isinstance(table, Table)
    assert table.rows[0][:3] == ["step 5", "4", "0.00"]
    assert int(table.rows[0][4]) >= 1
    assert "features of mine to 10 real pictures" in table.notes[0]


def test_what_cannot_be_compared_is_refused(run: Path, tmp_path: Path) -> None:
    features = str(tmp_path / "features")
    answer = fewstep("report", run, "--images", tmp_path)
    assert (answer.code, "belongs to --neighbours FEATURES" in answer.err) == (2, True)
    (run / "settings.json").write_text(json.dumps({"run": {"sample_images": 4}}))
    with pytest.raises(UserError, match=r"name no real pictures \(data\.images\); give --images"):
        memorisation_sections(read_run(run), features)
    (run / "settings.json").write_text(json.dumps({"data": {"images": str(tmp_path)}, "run": {"sample_images": 5}}))
    with pytest.raises(UserError, match=r"is not a grid of square pictures, as many as run\.samples says"):
        memorisation_sections(read_run(run), features)
    (run / "samples/generator_00000005.png").unlink()
    with pytest.raises(UserError, match="has no sample pictures yet"):
        memorisation_sections(read_run(run), features)
