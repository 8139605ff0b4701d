"""A small classifier learns the classes of a data set, and comes back from disk as it was."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.images import ImageDataset, load_images
from fewstep.errors import UserError
from fewstep.evaluation.features import SmallClassifier, extract_features, load_features
from fewstep.preparation.features import accuracy, train_feature_network
from fewstep.settings import DataSettings
from tests.conftest import write_pictures

TRAINING: dict[str, Any] = {"num_classes": 4, "num_passes": 16, "batch_size": 32, "device": "cpu"}


def open_pictures(folder: Path, num_classes: int = 4) -> ImageDataset:
    return load_images(DataSettings(images=str(folder)), resolution=16, channels=1, num_classes=num_classes)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    return open_pictures(write_pictures(tmp_path_factory.mktemp("pictures"), count=64))


@pytest.fixture(scope="module")
def trained(dataset: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[SmallClassifier, Path]:
    folder = tmp_path_factory.mktemp("features") / "net"
    return train_feature_network(dataset, folder, **TRAINING, name="brightness"), folder


@pytest.mark.slow
def test_learns_separable_classes(trained: tuple[SmallClassifier, Path], dataset: ImageDataset) -> None:
    """Brightness tells the four classes apart; chance is 0.25."""
    torch.manual_seed(0)
    assert accuracy(SmallClassifier(1, 4).eval(), dataset) < 0.6
    assert accuracy(trained[0], dataset, batch_size=7) > 0.8


def test_unseen_pictures_are_learned_too(trained: tuple[SmallClassifier, Path], tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    for number in range(20):
        place = tmp_path / f"class{number % 4}"
        place.mkdir(exist_ok=True)
        pixels = np.clip(generator.normal(60 + 40 * (number % 4), 25, (16, 16)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    assert accuracy(trained[0], open_pictures(tmp_path)) > 0.8


def test_accuracy_counts_right_answers() -> None:
    class Reader(SmallClassifier):
        def logits(self, images: torch.Tensor) -> torch.Tensor:
            """The label is written in the first pixel, wrongly for every third picture."""
            said = ((images[:, 0, 0, 0] + 1) * 127.5).round().long()
            return torch.nn.functional.one_hot(said, 4).float()

    class Pictures:
        labels = torch.tensor([0, 1, 2, 3, 0, 1])

        def __len__(self) -> int:
            return 6

        def pixels(self, rows: torch.Tensor) -> torch.Tensor:
            written = torch.tensor([0, 1, 0, 3, 0, 3])[rows]
            return written[:, None, None, None].expand(-1, 1, 8, 8).to(torch.uint8)

    assert accuracy(Reader(1, 4), Pictures(), batch_size=4) == pytest.approx(4 / 6)  # type: ignore[arg-type]


def test_round_trip(trained: tuple[SmallClassifier, Path], dataset: ImageDataset) -> None:
    """Stored in half precision: features agree to its accuracy, and a second round trip changes nothing."""
    model, folder = trained
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    again = SmallClassifier.load(folder)
    assert (again.name, again.training) == ("brightness", False)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    images = dataset.pixels(torch.arange(8)).float() / 127.5 - 1
    assert again(images).shape == (8, 128)
    torch.testing.assert_close(again(images), model(images), rtol=1e-2, atol=1e-2)
    again.save(folder.with_name("second"))
    assert torch.equal(load_features(str(folder.with_name("second")))(images), again(images))
    assert accuracy(again, dataset) == accuracy(model, dataset)


@pytest.mark.slow
def test_same_seed_same_network(dataset: ImageDataset, tmp_path: Path) -> None:
    options = {**TRAINING, "num_passes": 1}
    weights = [
        train_feature_network(dataset, tmp_path / str(number), **options, seed=seed, flip=True).state_dict()
        for number, seed in enumerate((1, 1, 2))
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["head.weight"], weights[2]["head.weight"])


def test_progress_is_reported(dataset: ImageDataset, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    train_feature_network(
        dataset, tmp_path / "net", num_classes=4, num_passes=2, batch_size=64, device="cpu",
        report=lambda *row: seen.append(row),
    )  # fmt: skip
    assert seen == [(1, 2), (2, 2)]


def test_pictures_without_labels(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "flat/a.png")
    dataset = open_pictures(tmp_path / "flat", num_classes=0)
    with pytest.raises(UserError, match="needs labelled pictures: sort them into one folder a class"):
        train_feature_network(dataset, tmp_path / "net", num_classes=4, device="cpu")
    assert not (tmp_path / "net").exists()


def test_a_failing_save_leaves_the_network_before(
    trained: tuple[SmallClassifier, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = trained
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fewstep.evaluation.features.write_tensor_file", full)
    with pytest.raises(UserError, match=r"cannot write .*net: .*No space left"):
        model.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


# --- Loading what is not a feature network


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        "{}",
        '{"channels": 1, "num_classes": 4, "depth": 3}',
        '{"channels": 3, "num_classes": 4, "width": 32, "name": "x"}',
    ],
)
def test_another_or_a_damaged_config(trained: tuple[SmallClassifier, Path], tmp_path: Path, config: str) -> None:
    (tmp_path / "model.safetensors").write_bytes((trained[1] / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"holds no feature network .*train one with `fewstep prepare features`"):
        load_features(str(tmp_path))


@pytest.mark.parametrize("damage", ["missing", "truncated", "pickled"])
def test_damaged_weights(trained: tuple[SmallClassifier, Path], tmp_path: Path, damage: str) -> None:
    (tmp_path / "config.json").write_text((trained[1] / "config.json").read_text())
    content = (trained[1] / "model.safetensors").read_bytes()
    if damage != "missing":
        broken = {"truncated": content[:-10], "pickled": pickle.dumps({"head.weight": 1})}[damage]
        (tmp_path / "model.safetensors").write_bytes(broken)
    with pytest.raises(UserError, match="holds no feature network"):
        load_features(str(tmp_path))


def test_an_empty_folder_and_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no feature network"):
        load_features(str(tmp_path))
    with pytest.raises(UserError, match="bundled:nothing does not ship with this version"):
        load_features("bundled:nothing")


def test_features_see_pictures_as_files_would_have_them(trained: tuple[SmallClassifier, Path]) -> None:
    """Rounded to 8 bit and clamped; batches are put together again in order."""
    model = trained[0]
    images = torch.linspace(-1.2, 1.2, 5 * 256).reshape(5, 1, 16, 16)
    found = extract_features(model, iter(images.split(2)))
    rounded = ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    torch.testing.assert_close(found, model(rounded))
    assert not torch.allclose(found, model(images), atol=1e-4)
    assert json.loads((trained[1] / "config.json").read_text())["num_classes"] == 4


@pytest.mark.parametrize(("precision", "narrow"), [("auto", False), ("bf16", True)])
def test_it_trains_in_the_precision_that_is_fast(
    dataset: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, narrow: bool
) -> None:
    """In tests `auto` is fp32; bf16 unasked is 15 times slower on processors without instructions for it."""
    seen: list[bool] = []
    logits = SmallClassifier.logits

    def watched(self: SmallClassifier, images: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return logits(self, images)

    monkeypatch.setattr(SmallClassifier, "logits", watched)
    options = {**TRAINING, "num_passes": 1, "batch_size": 64, "width": 4}
    train_feature_network(dataset, tmp_path / "net", **options, precision=precision)
    assert seen == [narrow]
