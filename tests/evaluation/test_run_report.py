"""The page of a run folder: what lies in it is shown, and folders that are not runs are refused."""

import base64
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep.errors import UserError
from fewstep.evaluation.measurement import Measurement, Value
from fewstep.evaluation.report import run_report
from fewstep.evaluation.report.run_curves import BARS, averaged, quality_sections
from fewstep.evaluation.report.run_files import open_picture, read_run, single_pictures
from fewstep.evaluation.report.run_report import run_sections, write_run_report
from fewstep.evaluation.report.sections import Curve, Curves, Filmstrip, Section, Slider, Table
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
        | ({"gan_loss": -0.5, "generator_grad_norm": 0.1} if step % 5 == 0 else {})
        for step in range(steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "fake')
    (folder / "settings.json").write_text(
        json.dumps(
            {
                "training": {"batch_size": 4, "seed": 0, **settings},
                "run": {"sample_images": 4, "folder": str(folder)},
                "expected": "",
            }
        )
    )
    interval = {"frechet_distance_low": 7.0, "frechet_distance_high": 11.5}
    (folder / "curve.json").write_text(
        json.dumps([{"step": 1, "seconds": 1.0, "frechet_distance": 9.0, "num_images": 300, **interval}])
    )
    (folder / "alarms.jsonl").write_text(json.dumps({"step": 20, "alarm": "contrast is 3 times the teacher's"}) + "\n")
    for step in range(0, steps, 3):
        save_grid(folder / "samples" / f"generator_{step:08d}.png", torch.rand(4, 1, 8, 8), 4)
        save_grid(folder / "samples" / f"teacher_score_{step:08d}.png", torch.rand(4, 1, 8, 8), 4)
    save_grid(folder / "samples" / "teacher_00000001.png", torch.rand(4, 1, 8, 8), 4)
    (folder / "samples" / "classes.txt").write_text("shoe\nbag\nshoe\nbag\n")
    rows = [{"step": step, "saturation": 0.0, "contrast": 0.4, "diversity": 0.1 * step} for step in range(0, steps, 9)]
    (folder / "sample_statistics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "teacher_statistics.json").write_text(json.dumps({"saturation": 0.0, "contrast": 0.5, "diversity": 0.3}))
    return folder


def scores(folder: Path, num_images: int = 500) -> None:
    """As `fewstep evaluate` leaves them beside a run."""
    rows = []
    for step, weights, distance in ((10, "raw", 5.0), (10, "average", 4.0), (20, "raw", 3.0), (20, "average", 4.5)):
        values = {
            "frechet_distance": Value(distance, num_images, (distance - 1, distance + 1)),
            "images_per_second": Value(9.0, 500),
        }
        found = Measurement(f"run, step {step}, {weights}", values, num_images, "features", 64, 7000, 4, 3)
        rows.append({"step": step, "seconds": step * 3600.0, "weights": weights, **found.to_dict()})
    (folder / "evaluation.json").write_text(json.dumps(rows))


def curves(sections: list[Section]) -> dict[str, dict[str, Curve]]:
    return {part.title: {one.title: one for one in part.curves} for part in sections if isinstance(part, Curves)}


def test_one_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    page = write_run_report([folder], tmp_path / "page.html").read_text()
    assert "Run run" in page
    assert page.count('src="data:image/png;base64,') == 10 + 2
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
    assert {title: [*named] for title, named in curves(sections).items()} == {
        "Quality while it trained": ["Frechet distance against steps", "Frechet distance against time"],
        "Saturation, contrast and diversity of the samples": [
            "contrast",
            "diversity",
        ],  # grey pictures have no saturation
        "Losses": ["fake score loss", "gan loss"],
        "Gradient norms": ["generator grad norm"],
        "Throughput and memory": ["images per second", "share of a step that waits for data"],
    }
    assert len(curves(sections)["Losses"]["gan loss"].series[0].points) == 6
    assert curves(sections)["Saturation, contrast and diversity of the samples"]["contrast"].marks == [("teacher", 0.5)]


def test_samples_are_a_film_and_stand_against_the_teacher(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", steps=120)
    sections = run_sections([read_run(folder)])
    film = next(section for section in sections if isinstance(section, Filmstrip))
    captions = [caption for caption, _ in film.frames]
    assert (len(captions), captions[0], captions[-1]) == (24, "step 0", "step 117")
    assert film.note == "Each row is one seed. 16 of 40 are not shown. In order: shoe · bag · and again."
    slider = next(section for section in sections if isinstance(section, Slider))
    assert (slider.left[0], slider.right[0]) == ("generator, step 117", "teacher")
    singles = single_pictures(read_run(folder), open_picture(folder / "samples/teacher_00000001.png"))
    assert [one.size for one in singles] == [(8, 8)] * 4
    save_grid(folder / "samples/teacher_00000001.png", torch.rand(6, 1, 8, 8), 3)  # run.sample_images was another
    assert not any(isinstance(section, Slider) for section in run_sections([read_run(folder)]))
    assert len(single_pictures(read_run(folder), open_picture(folder / "samples/teacher_00000001.png"))) == 1


def test_the_slider_has_as_few_columns_as_a_phone_shows(tmp_path: Path) -> None:
    """Of twelve pictures six a row; the teacher's first ones where it made more of them in an earlier session."""
    folder = run_folder(tmp_path / "run", steps=6)
    settings = json.loads((folder / "settings.json").read_text())
    settings["run"]["sample_images"] = 12
    (folder / "settings.json").write_text(json.dumps(settings))
    colours = torch.linspace(-1, 1, 20).view(20, 1, 1, 1).expand(20, 1, 8, 8)
    save_grid(folder / "samples/generator_00000003.png", colours[:12], 10)
    save_grid(folder / "samples/teacher_00000001.png", colours, 10)
    slider = next(one for one in run_sections([read_run(folder)]) if isinstance(one, Slider))
    assert slider.left[1] == slider.right[1]
    content = base64.b64decode(slider.left[1].partition(",")[2])
    assert Image.open(io.BytesIO(content)).size == (6 * 9 - 1, 2 * 9 - 1)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (4, 4), (7, 6), (8, 4), (10, 5), (12, 6), (20, 5), (24, 6)])
def test_columns_of_the_slider(count: int, columns: int) -> None:
    assert run_report._columns(count) == columns


def test_values_that_no_curve_shows_are_counted(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", steps=6)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(6):
            loss = float("nan") if step in (2, 3) else 1.0
            file.write(
                json.dumps(
                    {
                        "step": step,
                        "fake_score_loss": loss,
                        "mean": float("nan"),
                        "generator_grad_norm": float("inf") if step == 4 else 2.0,
                    }
                )
                + "\n"
            )
    warned = {part.title: part.warnings for part in run_sections([read_run(folder)]) if isinstance(part, Curves)}
    assert warned["Losses"] == [
        "warning: run: fake score loss is NaN or infinite in 2 steps, which its curve leaves out"
    ]
    assert warned["Other metrics"] == ["warning: run: mean is NaN or infinite in 6 steps, which its curve leaves out"]
    assert "generator grad norm is NaN or infinite in 1 step," in warned["Gradient norms"][0]


def test_large_pictures_do_not_make_a_large_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path / "run", steps=6)
    for path in (folder / "samples").glob("[gt]*r_0*.png"):
        save_grid(path, torch.rand(4, 3, 100, 100), 4)
    assert write_run_report([folder], tmp_path / "page.html").stat().st_size > 400_000
    monkeypatch.setattr(run_report, "PICTURE_BYTES", 100_000)
    assert write_run_report([folder], tmp_path / "page.html").stat().st_size < 150_000


def test_a_picture_that_pil_does_not_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_grid(tmp_path / "large.png", torch.rand(1, 3, 40, 40), 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="has too many pixels for a page"):
        open_picture(tmp_path / "large.png")


def test_figures_of_checkpoints_have_intervals_and_every_condition(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    scores(folder)
    quality, table = quality_sections([read_run(folder)])[1:]
    assert isinstance(quality, Curves)
    by_step, by_time = quality.curves
    assert [line.name for line in by_step.series] == ["raw weights", "average weights"]
    assert by_step.series[0].intervals == [(4.0, 6.0), (2.0, 4.0)]
    assert (by_time.x_label, by_time.series[0].points[1]) == ("hours of training", (20.0, 3.0))
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == [
        "raw weights, step 20",
        "average weights, step 10",
        "average weights, step 20",
    ]
    assert table.rows[0][2] == "3.000 ± 1.000 (500)"
    assert "500 images against 7000 real ones, features features, 4 evaluations per image, seed 3" in table.notes[0]
    assert not table.warnings
    scores(folder_b := run_folder(tmp_path / "b"), num_images=60)
    table = quality_sections([read_run(folder), read_run(folder_b)])[-1]
    assert isinstance(table, Table)
    assert "not all measured in one way (num images differ)" in table.warnings[0]
    assert "60 images are fewer than" in table.warnings[1]


def test_a_proxy_is_called_one_wherever_it_is_drawn(tmp_path: Path) -> None:
    scores(folder := run_folder(tmp_path / "run"))
    rows = json.loads((folder / "evaluation.json").read_text())
    why = {"protocol": "cifar10-50k", "proxy": "500 images, not 50,000"}
    (folder / "evaluation.json").write_text(json.dumps([row | why for row in rows]))
    quality, table = quality_sections([read_run(folder)])[1:]
    assert isinstance(quality, Curves)
    assert isinstance(table, Table)
    assert [curve.title for curve in quality.curves] == [
        "Frechet distance (PROXY) against steps",
        "Frechet distance (PROXY) against time",
    ]
    assert quality.warnings == ["PROXY of cifar10-50k (500 images, not 50,000)."]
    assert all("PROXY of cifar10-50k" in row[0] for row in table.rows)
    assert all(note.startswith("PROXY of cifar10-50k (500 images") for note in table.notes)


def test_one_figure_beside_a_run_and_damaged_ones(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    found = Measurement("mine", {"frechet_distance": Value(2.0, 50), "images_per_second": Value(1.0, 50)}, 50)
    (folder / "evaluation.json").write_text(json.dumps(found.to_dict()))
    table = quality_sections([read_run(folder)])[-1]
    assert isinstance(table, Table)
    assert table.rows[0][0] == "mine"
    for damaged in ("{", "3", '[{"step": 1}]'):
        (folder / "evaluation.json").write_text(damaged)
        with pytest.raises(UserError, match=r"evaluation\.json is damaged"):
            read_run(folder)


def test_how_the_best_generator_was_found_is_told(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "best.json").write_text(json.dumps([{"step": 1, "seconds": 1.0, "frechet_distance": 9.0}]))
    watched = quality_sections([read_run(folder)])[0]
    assert isinstance(watched, Curves)
    assert watched.curves[0].series[0].intervals == [(7.0, 11.5)]
    assert watched.notes == [f"300 images, features and reference not recorded here; {BARS}"]
    rows = [
        {**row, "judge": "features f (8 of them), 60 real pictures"}
        for row in json.loads((folder / "curve.json").read_text())
    ]
    (folder / "curve.json").write_text(json.dumps(rows))
    told = quality_sections([read_run(folder)])[0]
    assert isinstance(told, Curves)
    assert told.notes == [f"300 images, features f (8 of them), 60 real pictures; {BARS}"]
    settings = {
        "best": {"features": "inception.pth", "reference": "real.npz", "num_images": 300},
        "compute": {"precision": "bf16"},
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    section = quality_sections([read_run(folder)])[1]
    assert isinstance(section, Curves)
    assert section.notes == [
        "300 images, features inception.pth, reference real.npz, seed 1, precision bf16; without intervals."
    ]


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
    assert page.count("<polyline") == 2 * 2 * 9  # and in the legends
    assert "Samples of a" in page
    table = next(part for part in run_sections([read_run(folder) for folder in folders]) if isinstance(part, Table))
    assert [list(row) for row in table.rows] == [["training.batch_size", "4", "8"]]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / "a/run"), run_folder(tmp_path / "b/run"), run_folder(tmp_path / "c")]
    page = write_run_report(folders, tmp_path / "page.html").read_text()
    for words in ("Runs a/run and b/run and c", "Samples of a/run", "Samples of b/run"):
        assert words in page
    assert page.count("<polyline") == 3 * 2 * 9
    with pytest.raises(UserError, match=r"a/run is named twice; name each run once"):
        write_run_report([folders[0], tmp_path / "a/../a/run"], tmp_path / "page.html")


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
