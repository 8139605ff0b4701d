"""What a run is not told: the network from the pictures, how a student reads pictures from its teacher."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fewstep.data.look import look_at_pictures
from fewstep.errors import UserError
from fewstep.models.load import load_teacher
from fewstep.settings import DataSettings, PretrainSettings, TrainSettings, parse_settings
from fewstep.training.inferred import settle_data, settle_network, suppose_network
from fewstep.training.run import pretrain, train
from tests.training.helpers import tiny_pretrain_settings, tiny_train_settings


def folder_of(root: Path, side: int, mode: str, classes: int) -> Path:
    for label in range(classes or 1):
        place = root / f"class{label}" if classes else root
        place.mkdir(parents=True, exist_ok=True)
        for number in range(3):
            colour: Any = 60 * number if mode == "L" else (60 * number, 10, 200)
            Image.new(mode, (side, side + 2), colour).save(place / f"{number}.png")
    return root


def settings_of(images: Path, **network: Any) -> PretrainSettings:
    return parse_settings(PretrainSettings, {"data": {"images": str(images)}, "network": network}, "test")


@pytest.mark.parametrize(
    ("side", "mode", "classes", "found"),
    [(28, "L", 3, (24, 1, 3)), (100, "RGB", 0, (32, 3, 0)), (30, "RGB", 2, (24, 3, 2)), (40, "L", 1, (32, 1, 0))],
)
def test_the_network_follows_from_the_pictures(
    tmp_path: Path, side: int, mode: str, classes: int, found: tuple[int, int, int]
) -> None:
    told: list[str] = []
    images = folder_of(tmp_path / "pictures", side, mode, classes)
    net = settle_network(settings_of(images), tmp_path / "run", told.append).network
    assert (net.img_resolution, net.img_channels, net.label_dim) == found
    (line,) = told
    assert f"network.img_resolution={found[0]}, network.img_channels={found[1]}, network.label_dim={found[2]}" in line
    assert ("by folders" in line) == (classes > 1)
    keeps = f"pictures of {side} pixels are made smaller for it, network.img_resolution=32 with data.fit=pad keeps them"
    assert (keeps in line) == (side in (28, 30))


def test_what_is_set_stays(tmp_path: Path) -> None:
    told: list[str] = []
    images = folder_of(tmp_path / "pictures", 40, "L", 3)
    net = settle_network(settings_of(images, label_dim=0, img_channels=3), tmp_path / "run", told.append).network
    assert (net.img_resolution, net.img_channels, net.label_dim) == (32, 3, 0)
    whole = settings_of(images, label_dim=0, img_channels=3, img_resolution=16)
    assert settle_network(whole, tmp_path / "run", pytest.fail) == whole


def test_a_grey_picture_in_colour_is_grey_and_columns_are_labels(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), (70, 70, 70)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": 4}')
    found = look_at_pictures(DataSettings(images=str(tmp_path)))
    assert (found.channels, found.num_classes, found.labelled_by) == (1, 5, "column label")


def test_labels_that_number_no_class_are_told(tmp_path: Path) -> None:
    """A network without classes is what follows, and not what somebody with a column of labels expects."""
    told: list[str] = []
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": "cat"}')
    assert settle_network(settings_of(tmp_path), tmp_path / "run", told.append).network.label_dim == 0
    assert "no classes, because column 'label' holds 'cat' for a.png, not integer class labels" in told[0]
    settle_network(settings_of(tmp_path, label_dim=0), tmp_path / "run", told.append)
    assert "no classes, because" not in told[1]


def test_pictures_that_are_too_small(tmp_path: Path) -> None:
    images = folder_of(tmp_path / "pictures", 5, "L", 0)
    with pytest.raises(UserError, match=r"network.img_resolution is not set and the smallest picture has 5 pixels"):
        settle_network(settings_of(images), tmp_path / "run", lambda line: None)


def test_a_rehearsal_needs_no_pictures() -> None:
    told: list[str] = []
    net = suppose_network(PretrainSettings(), told.append).network
    assert (net.img_resolution, net.img_channels, net.label_dim) == (32, 3, 0)
    assert "supposed" in told[0]


@pytest.mark.slow
def test_a_run_stores_what_was_found_and_goes_on_with_it(pictures: Path, tmp_path: Path) -> None:
    """Also where the pictures would say something else by then; the student reads them as its teacher did."""
    open_network = {"name": "tiny", "img_resolution": 0, "img_channels": 0, "label_dim": -1}
    data = {"images": str(pictures), "fit": "pad", "background": "black"}
    settings = tiny_pretrain_settings(
        pictures, tmp_path / "teacher", training={"num_steps": 1}, network=open_network, data=data
    )
    run = pretrain(settings)
    net = run.settings.network  # type: ignore[union-attr]
    assert (net.img_resolution, net.img_channels, net.label_dim) == (16, 1, 4)
    assert settle_network(settings, tmp_path / "teacher", pytest.fail).network == net
    told: list[str] = []
    student = parse_settings(
        TrainSettings, {"data": {"images": str(pictures)}, "teacher": {"path": str(tmp_path / "teacher")}}, "test"
    )
    found = settle_data(student, load_teacher(tmp_path / "teacher", device="cpu"), tmp_path / "student", told.append)
    assert (found.data.fit, found.data.background) == ("pad", "black")
    assert told == ["data.fit='pad', data.background='black', data.flip=True: as the teacher's pictures were read"]
    said = parse_settings(TrainSettings, {"data": {"images": str(pictures), "fit": "crop"}}, "test")
    kept = settle_data(said, load_teacher(tmp_path / "teacher", device="cpu"), tmp_path / "student", told.append)
    assert (kept.data.fit, kept.data.background) == ("crop", "black")
    done = train(tiny_train_settings(
        tmp_path / "teacher", pictures, tmp_path / "student", training={"num_steps": 1}, data={"images": str(pictures)}
    ))  # fmt: skip
    assert done.settings.data.fit == "pad"


def test_a_parquet_file_is_looked_at(tmp_path: Path) -> None:
    import datasets

    folder_of(tmp_path / "pictures", 28, "L", 0)
    rows = {"image": [str(path) for path in sorted((tmp_path / "pictures").glob("*.png"))], "label": [2, 0, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
    look = look_at_pictures(DataSettings(images=str(tmp_path / "x.parquet")))
    assert (look.channels, look.num_classes) == (1, 3)
