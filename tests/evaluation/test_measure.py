"""A figure says how it was measured, and measuring in other batches gives the same figure."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.data.images import load_images
from fewstep.errors import UserError
from fewstep.evaluation import measure as protocols
from fewstep.evaluation.measure import (
    NotPictures,
    dataset_features,
    distance_of,
    evenly,
    figure_of,
    measure_model,
    measure_sampler,
)
from fewstep.evaluation.measurement import Measurement, Value, mean_of
from fewstep.evaluation.metrics import FeatureStatistics, frechet_distance, frechet_slope_error, kernel_distance
from fewstep.evaluation.neighbours import neighbour_shares
from fewstep.evaluation.sampler import model_sampler
from fewstep.formats.bundled import bundled_path
from fewstep.formats.model_folder import ModelCard
from fewstep.models.conditioner import LabelConditioner
from fewstep.models.model import Model, build_model
from fewstep.settings import DataSettings
from tests.cli.test_main import fewstep
from tests.conftest import tiny_denoiser


class Pooled:
    """Features one can compute by hand: 2x2 block means of the picture."""

    name = "block means"

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture
def generator() -> Model:
    return build_model(tiny_denoiser(), ModelCard("generator", step_indices=(999, 499)))


@pytest.fixture
def teacher() -> Model:
    return build_model(tiny_denoiser(), ModelCard("teacher", can_be_guided=True))


@pytest.fixture
def reference() -> FeatureStatistics:
    return FeatureStatistics.of(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) * 0.2)


@pytest.fixture
def labels_seen(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Every label a model of this test is sampled with."""
    seen: Counter[int] = Counter()
    original = LabelConditioner.wishes

    def watch(self: Any, *arguments: Any) -> list[int]:
        labels = original(self, *arguments)
        seen.update(labels)
        return labels

    monkeypatch.setattr(LabelConditioner, "wishes", watch)
    return seen


@pytest.mark.parametrize("batch_size", [3, 5, 100])
def test_labels_are_evenly_spread(
    generator: Model, reference: FeatureStatistics, labels_seen: Counter[int], batch_size: int
) -> None:
    measure_model(generator, "g", Pooled(), reference, num_images=22, seed=0, batch_size=batch_size)
    assert labels_seen == {0: 6, 1: 6, 2: 5, 3: 5}


def test_labels_of_a_teacher_are_evenly_spread(
    teacher: Model, reference: FeatureStatistics, labels_seen: Counter[int]
) -> None:
    measure_model(teacher, "t", Pooled(), reference, num_images=8, seed=0, num_steps=1, batch_size=3)
    assert labels_seen == {0: 2, 1: 2, 2: 2, 3: 2}


def figures_of(measurement: Measurement) -> dict[str, Any]:
    return {name: value for name, value in measurement.to_dict().items() if name != "images_per_second"}


@pytest.mark.slow
def test_figure_does_not_depend_on_the_batch(generator: Model, teacher: Model, reference: FeatureStatistics) -> None:
    """The same images in the same order, up to rounding in the network."""
    for model in (generator, teacher):
        networks = Pooled(), Pooled(), Pooled()
        found = [
            measure_model(model, "m", network, reference, num_images=10, seed=3, num_steps=2, batch_size=batch_size)
            for network, batch_size in zip(networks, (1, 4, 250), strict=True)
        ]
        assert [len(images) for images in networks[1].seen] == [4, 4, 2]
        images = [torch.cat(network.seen) for network in networks]
        assert (images[0] - images[2]).abs().max() <= 2 / 255 + 1e-6  # one grey level
        assert (images[1] - images[2]).abs().mean() < 1e-3
        distances = [measurement.frechet_distance for measurement in found]
        assert distances == pytest.approx([distances[0]] * 3, rel=1e-3)


def test_real_pictures_are_taken_evenly() -> None:
    """Those of a folder lie class by class."""
    assert evenly(torch.arange(10), 4).tolist() == [0, 2, 5, 7]
    assert evenly(torch.arange(3), 10).tolist() == [0, 1, 2]
    assert evenly(torch.arange(100_000), 50_000).tolist() == list(range(0, 100_000, 2))


def test_figure_is_that_of_the_models_images(generator: Model, reference: FeatureStatistics) -> None:
    real = torch.randn(30, 4, generator=torch.Generator().manual_seed(1)) * 0.2
    found = measure_model(
        generator, "mine", Pooled(), reference, num_images=12, seed=5, real_features=real, batch_size=12
    )
    images = generator.sample(12, seed=5, output="tensor")
    real = evenly(real, 12)
    rounded = ((images + 1) * 127.5).round() / 127.5 - 1
    features = Pooled()(rounded)
    shares = {key: float(value.double().mean()) for key, value in neighbour_shares(real, features).items()}
    assert shares.keys() == {"precision", "recall", "density", "coverage"}
    distance = frechet_distance(FeatureStatistics.of(features), reference)
    assert figures_of(found) == {
        "model": "mine", "frechet_distance": pytest.approx(distance, rel=1e-5), "num_images": 12,
        "num_reference_images": 40, "features": "block means", "num_features": 4, "evaluations_per_image": 2, "seed": 5, "dtype": "float32",
        "kid": pytest.approx(kernel_distance(real, features)[0], rel=1e-3, abs=1e-6), **shares,
        "num_images_of": {}, "intervals": found.to_dict()["intervals"],
    }  # fmt: skip
    low, high = found.values["frechet_distance"].interval or (0, 0)
    assert low < found.frechet_distance < high
    assert found.values["density"].interval == mean_of(neighbour_shares(real, features)["density"]).interval
    assert found.values.keys() - found.to_dict()["intervals"].keys() == {
        "kid",
        "images_per_second",
    }  # KID of 12 has none
    assert found.images_per_second > 0


@pytest.mark.parametrize(("real", "said"), [(7, "against 7 real pictures"), (12, ""), (30, ""), (40, "")])
def test_values_of_fewer_real_pictures_say_so(reference: FeatureStatistics, real: int, said: str) -> None:
    """30 are cut to the 12 made ones; the reference's 40 are named beside the figure."""
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(2))
    found = figure_of(
        "mine", {"frechet_distance": features}, Pooled(), reference, Value(1.0, 12), evaluations_per_image=1, seed=0,
        real_features=features.repeat(4, 1)[:real],
    )  # fmt: skip
    assert {value.by for name, value in found.values.items() if name in ("kid", "recall", "coverage")} == {said}
    assert found.values["frechet_distance"].by == ""
    assert Measurement.from_dict(found.to_dict()) == found


def test_wide_features_have_an_interval_too(generator: Model) -> None:
    """Where a distance is dear its error is that to first order; every other figure has one as well."""

    class Wide(Pooled):
        def __call__(self, images: Tensor) -> Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(images, 16).flatten(1).repeat(1, 2)[:, :257]

    features = Wide()(torch.randn(600, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    reference = FeatureStatistics.of(Wide()(torch.randn(600, 1, 16, 16, generator=torch.Generator().manual_seed(1))))
    error = frechet_slope_error(features, reference)
    assert error is not None
    low, high = distance_of(features, reference, 20).interval or (0, 0)
    assert high - low == pytest.approx(4 * error)
    assert distance_of(features, reference).interval is None
    assert distance_of(features[:500], reference, 20).interval is None


def test_teacher_is_measured_in_its_own_steps(teacher: Model, reference: FeatureStatistics) -> None:
    network = Pooled()
    found = measure_model(
        teacher, "t", network, reference, num_images=4, seed=2, num_steps=3, guidance_scale=2.0, batch_size=4
    )
    assert found.evaluations_per_image == 5
    assert (found.get("kid"), found.get("precision"), found.get("recall")) == (None, None, None)
    expected = teacher.sample(4, seed=2, num_inference_steps=3, guidance_scale=2.0, output="tensor")
    assert (network.seen[0] - expected).abs().max() < 1 / 255


def test_seeds_give_other_images(generator: Model, reference: FeatureStatistics) -> None:
    first, again, other = (
        measure_model(generator, "g", Pooled(), reference, num_images=8, seed=seed) for seed in (1, 1, 2)
    )
    assert first.frechet_distance == again.frechet_distance
    assert first.frechet_distance != other.frechet_distance


def test_samplers_continue_where_the_last_batch_ended(generator: Model, teacher: Model) -> None:
    for model, how in ((generator, {}), (teacher, {"num_inference_steps": 2})):
        sample, evaluations = model_sampler(model, 4, num_steps=2)
        assert evaluations == model.evaluations(**how)
        expected = model.sample(5, seed=4, output="tensor", **how)
        torch.testing.assert_close(torch.cat([sample(0, 3), sample(3, 2)]), expected, atol=1e-3, rtol=0)


def test_progress_is_told_before_the_first_batch(generator: Model, reference: FeatureStatistics) -> None:
    told: list[tuple[int, int]] = []
    measure_model(
        generator, "g", Pooled(), reference, num_images=7, seed=0, batch_size=3, report=lambda *at: told.append(at)
    )
    assert told == [(0, 7), (3, 7), (6, 7), (7, 7)]


def test_only_sampling_is_on_the_clock(monkeypatch: pytest.MonkeyPatch, reference: FeatureStatistics) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock, pooled = Clock(), Pooled()
    monkeypatch.setattr(protocols, "time", clock)

    def sample(first: int, count: int) -> Tensor:
        clock.now += 2.0
        return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(first))

    class Slow(Pooled):
        def __call__(self, images: Tensor) -> Tensor:
            clock.now += 100.0
            return pooled(images)

    found = measure_sampler(
        "m", sample, Slow(), reference, num_images=10, evaluations_per_image=1, seed=0, batch_size=4
    )
    assert found.images_per_second == pytest.approx(10 / 6)


def figure(**values: Value) -> Measurement:
    values = {"frechet_distance": Value(12.3456, 5000), "images_per_second": Value(81.25, 5000), **values}
    return Measurement("mine", values, 5000, "four classes", 128, 60000, 1, 7)


def test_sentence() -> None:
    assert figure().sentence() == (
        "mine: Frechet distance 12.346 (5000 images against 60000 real ones, features four classes, "
        "1 evaluation per image, seed 7; 81.2 images/s)"
    )
    more = figure(
        frechet_distance=Value(12.3456, 5000, (12.1, 12.6)), kid=Value(0.0012, 5000, (0.0011, 0.0013)), precision=Value(0.5, 5000)
    )  # fmt: skip
    assert "Frechet distance 12.346 ± 0.250, KID 0.001200 ± 0.000100, precision 0.500 (5000 images" in more.sentence()
    assert replace(figure(), dtype="bfloat16").sentence().endswith("seed 7, bfloat16; 81.2 images/s)")
    unknown = Measurement("mine", more.values, 5000, "x", 0, 0, 2, 7)
    assert "against an unrecorded number of real ones, features x, 2 evaluations per image" in unknown.sentence()


def test_cells() -> None:
    found = figure(held_out_distance=Value(3.0, 153))
    names = ("images_per_second", "frechet_distance", "held_out_distance", "agreement")
    assert found.cells(names) == ["1", "81.2", "12.346 (5000)", "3.000 (153)", "-"]
    assert Measurement("real", {"agreement": Value(0.75, 8)}, 8).cells(("agreement", "retrieval")) == [
        "-",
        "0.750 (8)",
        "-",
    ]


def test_what_is_written_is_read_again() -> None:
    """Flat, as scripts read it: each value is a plain number under its name."""
    found = figure(held_out_distance=Value(3.0, 153), kid=Value(0.0012, 5000, (0.001, 0.0014)))
    written = json.loads(json.dumps(found.to_dict()))
    assert written["frechet_distance"] == 12.3456
    assert written["num_images_of"] == {"held_out_distance": 153}
    assert Measurement.from_dict(written) == found
    half = replace(found, dtype="bfloat16")
    assert Measurement.from_dict(json.loads(json.dumps(half.to_dict()))) == half
    assert found.without("kid").get("kid") is None


def test_measurements_of_earlier_versions_are_read() -> None:
    shipped = json.loads(bundled_path("fashion-mnist/teacher_measurement.json").read_text())
    found = Measurement.from_dict(shipped)
    assert (found.frechet_distance, found.num_images, found.seed) == (shipped["frechet_distance"], 5000, 0)
    assert (found.dtype, Measurement.from_dict(shipped["on_curve"]).dtype) == ("", "bfloat16")
    assert "precision" not in found.values  # null in the file: not measured
    text = json.loads(bundled_path("emoji/teacher_measurement.json").read_text())["emoji-sd"]
    found = Measurement.from_dict(text)
    assert found.frechet_distance == text["trained"]["frechet_distance"]
    assert found.cells(("frechet_distance", "held_out_distance", "agreement", "shuffled", "retrieval")) == [
        "50", "2.109 (1000)", "2.739 (153)", "0.503 (153)", "0.123 (153)", "0.353 (153)",
    ]  # fmt: skip
    real = {"trained": None, "held_out_distance": 1.1, "following": text["following"], "retrieval": None}
    assert Measurement.from_dict(real).cells(("frechet_distance", "held_out_distance", "retrieval")) == [
        "-",
        "-",
        "1.100 (153)",
        "-",
    ]


def test_few_images_are_warned_of() -> None:
    """With no more pictures than features the covariance cannot have full rank."""
    few = Measurement("m", {"frechet_distance": Value(9.0, 128)}, 128, "f", 128)
    assert [line[:60] for line in few.cautions()] == ["warning: m: 128 images are fewer than a Frechet distance in "]
    assert "take at least 1280 images, or KID" in few.cautions()[0]
    assert Measurement("m", {"frechet_distance": Value(9.0, 129)}, 129, "f", 128).cautions() == []
    assert len(figure(held_out_distance=Value(3.0, 100)).cautions()) == 1


def test_few_real_images_are_warned_of_and_json_says_so() -> None:
    found = Measurement("m", {"frechet_distance": Value(9.0, 900)}, 900, "f", 128, 128)
    assert ["128 real images are fewer than" in line for line in found.cautions()] == [True]
    assert found.to_dict()["warnings"] == found.cautions()
    assert "warnings" not in replace(found, num_reference_images=129).to_dict()
    assert replace(found, values={"kid": Value(0.1, 900)}).cautions() == []


def test_the_guidance_of_a_teacher_stands_beside_its_figure(
    teacher: Model, generator: Model, reference: FeatureStatistics
) -> None:
    def measured(model: Model, guidance: float | None) -> Measurement:
        return measure_model(
            model, "m", Pooled(), reference, num_images=3, seed=0, guidance_scale=guidance, num_steps=None if model is generator else 2
        )  # fmt: skip

    found = measured(teacher, 2.5)
    assert found.settings == {"guidance_scale": 2.5}
    assert "3 evaluations per image at guidance 2.5, seed 0" in found.sentence()
    assert Measurement.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert measured(teacher, None).settings == {"guidance_scale": teacher.default_guidance}
    assert "guidance" not in measured(generator, 1.0).sentence()


def test_pictures_of_nan_are_no_figure(generator: Model, reference: FeatureStatistics) -> None:
    """Not a fault of the linear algebra, nor, in 8 bits, black pictures."""

    def sample(first: int, count: int) -> Tensor:
        images = torch.zeros(count, 1, 8, 8)
        images[first == 4 :, 0, 0, 0] = torch.nan if first == 4 else 0.0
        return images

    with pytest.raises(NotPictures, match="3 of the 4 pictures from number 4 on contain NaN or infinities"):
        measure_sampler("m", sample, Pooled(), reference, num_images=9, evaluations_per_image=1, seed=0, batch_size=4)


def test_no_file_is_worked_for_that_cannot_be_written(tmp_path: Path) -> None:
    model = ("bundled:fashion-mnist", "--device", "cpu", "--json")
    for words, place in (
        ("is a folder; give the name of a file", tmp_path),
        ("does not exist; make it first", tmp_path / "a/b"),
    ):
        features = ("--features", "nowhere", "--reference", "nowhere.npz")
        for answer in (fewstep("evaluate", *model, place, *features), fewstep("bench-inference", *model, place)):
            assert (answer.code, answer.out) == (2, "")
            assert words in answer.err


# --- Features of real pictures


def test_features_of_a_data_set(pictures: Path) -> None:
    dataset = load_images(DataSettings(images=str(pictures)), resolution=16, channels=1, num_classes=0)
    whole = dataset_features(Pooled(), dataset)
    expected = Pooled()(dataset.pixels(torch.arange(24)).float() / 127.5 - 1)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(dataset_features(Pooled(), dataset, batch_size=7), expected)
    torch.testing.assert_close(dataset_features(Pooled(), dataset, num_images=5), expected[:5])
    torch.testing.assert_close(dataset_features(Pooled(), dataset, num_images=1000), expected)
    with pytest.raises(UserError, match="needs at least 2 real images"):
        dataset_features(Pooled(), dataset, num_images=1)
