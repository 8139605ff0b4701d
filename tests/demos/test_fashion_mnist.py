"""The quick start for a few seconds, on the files that ship."""

import dataclasses
import json
import re
import socket
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fewstep
from fewstep.data.images import load_images
from fewstep.demos import fashion_mnist
from fewstep.demos.fashion_mnist import run_quickstart
from fewstep.errors import UserError
from fewstep.evaluation.bench import load_bench
from fewstep.evaluation.features import load_features
from fewstep.evaluation.measure import dataset_features
from fewstep.evaluation.metrics import FeatureStatistics, frechet_distance
from fewstep.formats.bundled import bundled_path
from fewstep.settings import DataSettings

ASSETS = bundled_path("fashion-mnist")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick start of two seconds on few pictures with networking off."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"

    def refuse(*args: object) -> None:
        raise AssertionError("the quick start opened a network connection")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        facts = dataclasses.replace(fashion_mnist.FACTS, measured=140, curve_images=130, fewest=130, shown=4, sampled=4)
        patch.setattr(fashion_mnist, "FACTS", facts)
        run_quickstart(folder, minutes=0.03, console=Console(quiet=True))
    return folder


@pytest.mark.slow
def test_report_is_one_self_contained_page(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    figures = json.loads((finished / "report.json").read_text())
    for role in ("teacher", "generator", "real"):
        assert f"{figures[role]['frechet_distance']:.3f}" in page
    assert "(5000)" in page
    assert "(140)" in page
    assert "130 pictures behind each point, 2,000 behind the teacher" in page
    assert {row[2] for row in figures["curve"]} == {130}
    assert figures["teacher"]["evaluations_per_image"] == 35
    assert figures["generator"]["evaluations_per_image"] == 2
    assert figures["curve"]
    assert "<svg" in page
    assert "<polyline" in page


@pytest.mark.slow
def test_the_page_is_about_the_best_generator(finished: Path) -> None:
    """Kept at the lowest point of the curve, measured again from other noise."""
    figures, bench = json.loads((finished / "report.json").read_text()), load_bench(ASSETS)
    precision = json.loads((finished / "settings.json").read_text())["compute"]["precision"]
    kept = fewstep.load_generator(finished / "best", device="cpu", precision=precision)
    found = bench.measure(kept, "generator", num_images=140, batch_size=250)
    assert found.frechet_distance == pytest.approx(figures["generator"]["frechet_distance"], rel=1e-3)
    lowest = min(json.loads((finished / "curve.json").read_text()), key=lambda point: point["frechet_distance"])
    assert kept.card.made_with["num_steps"] == lowest["step"]


@pytest.mark.slow
def test_pictures_appear_and_the_result_loads(finished: Path) -> None:
    names = {path.name.rsplit("_", 1)[0] for path in (finished / "samples").iterdir()}
    assert names == {"classes.txt", "generator", "teacher", "teacher_score", "fake_score"}
    generator = fewstep.load_generator(finished, device="cpu")
    images = generator.sample(12, seed=3, output="tensor")
    assert images.shape == (12, 1, 32, 32)
    assert images.std() > 0.3  # clothes, not grey
    assert torch.equal(fewstep.load_pipeline(finished)(num_images=12, seed=3, output_type="pt").images, images)


def test_no_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="more than 0 minutes"):
        run_quickstart(tmp_path / "run", minutes=0)


def test_shipped_files_stay_small() -> None:
    size = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    assert size < 10e6


@pytest.mark.slow
def test_shipped_statistics_belong_to_the_shipped_pictures_and_features() -> None:
    """The 7,000 shipped pictures, measured now, lie as close to the shipped statistics as a part of the set can."""
    settings = DataSettings(images=str(ASSETS / "train.parquet"), fit="pad")
    pictures = load_images(settings, resolution=32, channels=1, num_classes=10)
    assert len(pictures) == 7_000
    assert torch.bincount(pictures.labels).min() > 600
    found = FeatureStatistics.of(dataset_features(load_features("bundled:fashion-mnist"), pictures, 1500))
    shipped = FeatureStatistics.load(ASSETS / "reference_train.npz")
    assert shipped.num_images == 60_000
    assert frechet_distance(found, shipped) < 0.5


@pytest.mark.long
def test_shipped_teacher_measurement_can_be_repeated() -> None:
    """A tenth of the samples gives about the shipped distance."""
    from fewstep.evaluation.measure import measure_model

    shipped = json.loads((ASSETS / "teacher_measurement.json").read_text())
    teacher = fewstep.load_teacher("bundled:fashion-mnist", device="cpu", precision="fp32")
    reference = FeatureStatistics.load(ASSETS / "reference_train.npz")
    found = measure_model(teacher, "teacher", load_features("bundled:fashion-mnist"), reference, num_images=500, seed=0)
    assert found.evaluations_per_image == shipped["evaluations_per_image"] == 35
    assert 0.7 * shipped["frechet_distance"] < found.frechet_distance < 3 * shipped["frechet_distance"] + 1
