"""The page of a run folder: what lies in it is shown, and folders that are not runs are refused."""

import json
from pathlib import Path

import pytest
import torch

from fewstep.errors import UserError
from fewstep.evaluation.report.run_report import averaged, read_run, run_sections, write_run_report
from fewstep.evaluation.report.sections import Curve, Pictures, Table
from fewstep.formats.pixels import save_grid
from tests.cli.test_main import fewstep


def run_folder(folder: Path, steps: int = 30, **settings: float) -> Path:
    """As training leaves it, the last line cut short by a kill."""
    (folder / "samples").mkdir(parents=True)
    rows = [
        {
            "step": step,
            "fake_score_loss": 4.0 / (step + 1),
            "images_per_second": 7.5,
            "seconds": step * 2.0,
            "data_wait_share": 0.001 * step,
        }
        | ({"gan_loss": -0.5} if step % 5 == 0 else {})
        for step in range(steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "fake')
    (folder / "settings.json").write_text(
        json.dumps({"training": {"batch_size": 4, "seed": 0, **settings}, "expected": ""})
    )
    (folder / "curve.json").write_text(json.dumps([{"step": 1, "seconds": 1.0, "frechet_distance": 9.0}]))
    (folder / "alarms.jsonl").write_text(json.dumps({"step": 20, "alarm": "contrast is 3 times the teacher's"}) + "\n")
    for step in range(0, steps, 3):
        save_grid(folder / "samples" / f"generator_{step:08d}.png", torch.rand(4, 1, 8, 8), 2)
        save_grid(folder / "samples" / f"teacher_score_{step:08d}.png", torch.rand(4, 1, 8, 8), 2)
    return folder


def test_one_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    page = write_run_report([folder], tmp_path / "page.html").read_text()
    assert "Run run" in page
    assert page.count('src="data:image/png;base64,') == 6
    for words in (
        "30</b><span>steps",
        "fake score loss",
        "gan loss",
        "contrast is 3 times",
        "training.batch_size",
        "step 27",
        "1.45%</b><span>of the time of a step, waiting for data",
    ):
        assert words in page
    sections = run_sections([read_run(folder)])
    curves = {section.title: section for section in sections if isinstance(section, Curve)}
    assert curves.keys() == {"Quality against training time", "fake score loss", "gan loss"}
    assert len(curves["gan loss"].series[0].points) == 6
    shown = next(section for section in sections if isinstance(section, Pictures))
    assert [picture.caption for picture in shown.pictures] == [f"step {step}" for step in (0, 6, 12, 15, 21, 27)]
    assert shown.pictures[0].images.shape == (1, 3, 17, 17)


def test_the_command(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    answer = fewstep("report", folder)
    assert (answer.code, answer.out.strip()) == (0, str(folder / "run_report.html"))
    assert (folder / "run_report.html").is_file()
    answer = fewstep("report", folder, "--out", tmp_path / "missing/page.html")
    assert answer.code == 2
    assert "does not exist; make it first" in answer.err


def test_several_runs_lie_over_each_other_and_differ_somewhere(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b", steps=12, batch_size=8)]
    page = write_run_report(folders, tmp_path / "page.html").read_text()
    assert page.count("<polyline") == 2 * 3
    assert "Samples of a" in page
    table = next(part for part in run_sections([read_run(folder) for folder in folders]) if isinstance(part, Table))
    assert [list(row) for row in table.rows] == [["training.batch_size", "4", "8"]]


def test_curves_of_earlier_versions_do_not_stop_it(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "curve.json").write_text("[[0.0, 37.8], [0.5, 5.0]]")
    assert "Quality against" not in write_run_report([folder], tmp_path / "page.html").read_text()


def test_long_runs_are_averaged() -> None:
    points = [(float(step), float(step % 2)) for step in range(1000)]
    found = averaged(points)
    assert len(found) == 200
    assert found[-1][0] == 999.0
    assert all(0.3 < value < 0.7 for _, value in found)
    assert averaged(points[:5]) == points[:5]
    assert averaged([]) == []


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder with finished steps: metrics\.jsonl is not there"):
        write_run_report([tmp_path], tmp_path / "page.html")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no finished step yet"):
        read_run(tmp_path)
    folder = run_folder(tmp_path / "run")
    (folder / "curve.json").write_text("{")
    with pytest.raises(UserError, match=r"curve\.json is damaged"):
        read_run(folder)
    (folder / "curve.json").unlink()
    (folder / "samples/generator_00000000.png").write_text("x")
    with pytest.raises(UserError, match=r"generator_00000000\.png is damaged"):
        write_run_report([folder], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
