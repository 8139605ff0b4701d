import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.captioned_images import open_captioned_images
from fewstep.data.images import ImageBatches, ImageDataset, data_order, load_images
from fewstep.data.look import look_at_pictures
from fewstep.data.pictures import fit_picture
from fewstep.diffusion.draws import Draws
from fewstep.errors import UserError
from fewstep.evaluation.features import SmallClassifier
from fewstep.evaluation.measure import dataset_features
from fewstep.settings import DataSettings
from tests.conftest import write_pictures
from tests.formats.test_lmdb import change
from tests.lmdb_files import write_lmdb


def load(
    images: Path | str, *, resolution: int = 16, channels: int = 1, num_classes: int = 0, **settings: Any
) -> ImageDataset:
    return load_images(
        DataSettings(images=str(images), **settings), resolution=resolution, channels=channels, num_classes=num_classes
    )


def picture(value: int, size: tuple[int, int] = (16, 16), mode: str = "L") -> Image.Image:
    return Image.new(mode, size, value if mode == "L" else (value, 0, 255 - value))


def encoded(value: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture(value).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_values(folder: Path, values: dict[str, int]) -> Path:
    """Flat pictures {file: brightness}."""
    for name, value in values.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(value).save(folder / name)
    return folder


def write_parquet(path: Path, features: dict[str, Any], columns: dict[str, list[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    return path


def brightness(dataset: ImageDataset) -> list[int]:
    return dataset.pixels(torch.arange(len(dataset)))[:, 0, 0, 0].tolist()


# where pictures come from


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Six pictures of 16x16 in the layout of the published ImageNet LMDB."""
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 3, 16, 16).contiguous()
    write_lmdb(tmp_path / "set", {"images": images, "labels": torch.tensor([[3], [0], [1], [2], [3], [0]])})
    return tmp_path / "set"


def test_a_published_lmdb(imagenet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load(imagenet, channels=3, num_classes=4)
    assert dataset.in_memory
    assert brightness(dataset) == list(range(6))
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [3, 0, 1, 2, 3, 0]
    monkeypatch.setattr("fewstep.data.images._MEMORY_LIMIT_BYTES", 0)
    lazy = load(imagenet, channels=3)
    assert (lazy.in_memory, lazy.labels) == (False, None)
    assert lazy.pixels(torch.tensor([5, 2])).float().mean(dim=(1, 2, 3)).tolist() == [5, 2]
    batches = [ImageBatches(data, 0, 4, False).at(1, "cpu")[0] for data in (dataset, lazy)]
    assert torch.equal(*batches)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("images_4_data", None, "images_4_data is missing of 6 rows; the data set is incomplete or damaged"),
        ("labels_0_data", b"\x09" + bytes(7), "labels run from 0 to 9, the model has 4 classes (0..3)"),
        ("labels_shape", b"5 1", "labels of shape (5, 1) do not belong to 6 pictures"),
        ("labels_shape", None, "the key labels_shape is missing (arrays there: images)"),
    ],
)
def test_a_published_lmdb_that_cannot_be_used(imagenet: Path, key: str, value: bytes | None, told: str) -> None:
    change(imagenet, key, value)
    with pytest.raises(UserError) as error:
        load(imagenet, channels=3, num_classes=4)
    assert told in str(error.value)
    assert str(imagenet) in str(error.value)


def test_a_published_lmdb_of_another_size_or_cut_short(imagenet: Path) -> None:
    with pytest.raises(UserError, match=r"pictures of shape \(6, 3, 16, 16\), the model makes \(3, 32, 32\)"):
        load(imagenet, channels=3, resolution=32)
    with (imagenet / "data.mdb").open("r+b") as file:
        file.truncate((imagenet / "data.mdb").stat().st_size // 2)
    with pytest.raises(UserError, match="is cut short"):
        load(imagenet, channels=3)


def test_class_folders(pictures: Path) -> None:
    dataset = load(pictures, num_classes=4)
    assert len(dataset) == 24
    assert dataset.class_names == ["class0", "class1", "class2", "class3"]
    assert dataset.labels.dtype == torch.int64
    assert dataset.labels.bincount().tolist() == [6, 6, 6, 6]
    pixels = dataset.pixels(torch.arange(24))
    assert pixels.shape == (24, 1, 16, 16)
    assert pixels.dtype == torch.uint8
    for label in range(4):  # write_pictures: brightness 60 + 40 label
        assert abs(pixels[dataset.labels == label].float().mean().item() - (60 + 40 * label)) < 8
    files = sorted((pictures / "train" / "class2").glob("*.png"))
    row = (dataset.labels == 2).nonzero()[0]
    np.testing.assert_array_equal(pixels[row][0, 0], np.asarray(Image.open(files[0])))


def test_class_folders_without_a_split(tmp_path: Path) -> None:
    dataset = load(write_values(tmp_path, {"cat/1.png": 10, "dog/1.jpg": 20, "cat/2.png": 30}), num_classes=2)
    assert dataset.class_names == ["cat", "dog"]
    assert sorted(zip(dataset.labels.tolist(), brightness(dataset), strict=True)) == [(0, 10), (0, 30), (1, 20)]


def test_splits_are_told_apart(tmp_path: Path) -> None:
    write_values(tmp_path, {"train/1.png": 10, "train/2.png": 20, "test/3.png": 30})
    assert sorted(brightness(load(tmp_path))) == [10, 20]
    assert brightness(load(tmp_path, split="test")) == [30]


def test_labels_are_left_alone_without_classes(pictures: Path) -> None:
    dataset = load(pictures)
    assert dataset.labels is None
    assert dataset.class_names is None


@pytest.fixture
def with_metadata(tmp_path: Path) -> Path:
    write_values(tmp_path, {f"train/{i}.png": 50 * i for i in range(4)})
    lines = [{"file_name": f"{i}.png", "label": 3 - i, "group": i // 2, "word": f"w{i}"} for i in range(4)]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return tmp_path


def test_metadata_labels(with_metadata: Path) -> None:
    dataset = load(with_metadata, num_classes=4)
    assert dict(zip(brightness(dataset), dataset.labels.tolist(), strict=True)) == {0: 3, 50: 2, 100: 1, 150: 0}
    assert dataset.class_names is None
    other = load(with_metadata, num_classes=2, column="group")
    assert dict(zip(brightness(other), other.labels.tolist(), strict=True)) == {0: 0, 50: 0, 100: 1, 150: 1}


@pytest.mark.parametrize("place", ["pictures.parquet", "folder/pictures.parquet"])
def test_parquet_file_and_folder(tmp_path: Path, place: str) -> None:
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    path = write_parquet(tmp_path / place, features, {"image": [encoded(v) for v in (5, 6, 7)], "label": [2, 0, 1]})
    dataset = load(path if "/" not in place else path.parent, num_classes=3)
    assert brightness(dataset) == [5, 6, 7]
    assert dataset.labels.tolist() == [2, 0, 1]
    assert dataset.class_names == ["a", "b", "c"]


def test_parquet_with_another_image_column_and_labels_in_lists(tmp_path: Path) -> None:
    features = {"id": datasets.Value("string"), "img": datasets.Image(), "y": datasets.List(datasets.Value("int64"))}
    columns = {"id": ["a", "b"], "img": [encoded(5), encoded(6)], "y": [[1], [0]]}
    dataset = load(write_parquet(tmp_path / "x.parquet", features, columns), num_classes=2, column="y")
    assert brightness(dataset) == [5, 6]
    assert dataset.labels.tolist() == [1, 0]


def test_large_sets_are_decoded_when_asked_for(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = load(pictures, num_classes=4)
    monkeypatch.setattr("fewstep.data.images._MEMORY_LIMIT_BYTES", 0)
    lazy = load(pictures, num_classes=4)
    assert lazy._decoded is None
    assert held._decoded is not None
    rows = torch.tensor([23, 0, 7, 7])
    assert torch.equal(lazy.pixels(rows), held.pixels(rows))


def test_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_values(tmp_path, {"pictures/1.png": 9})
    assert brightness(load("~/pictures")) == [9]


# pixels


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_kinds_of_pictures_become_grey_or_colour(tmp_path: Path, mode: str) -> None:
    original = picture(200, mode="RGB").convert(mode)
    original.save(tmp_path / "1.png")
    for channels, kind in ((1, "L"), (3, "RGB")):
        pixels = load(tmp_path, channels=channels).pixels(torch.tensor([0]))
        assert pixels.shape == (1, channels, 16, 16)
        expected = np.asarray(original.convert(kind)).reshape(16, 16, channels)
        np.testing.assert_array_equal(pixels[0].permute(1, 2, 0), expected)


def test_colour_keeps_rows_columns_and_channels_apart(tmp_path: Path) -> None:
    original = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(original).save(tmp_path / "1.png")
    pixels = load(tmp_path, channels=3).pixels(torch.tensor([0]))[0]
    assert pixels[2, 3, 5].item() == original[3, 5, 2]
    np.testing.assert_array_equal(pixels.permute(1, 2, 0), original)


def test_sixteen_bit_grey_keeps_its_shades(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "1.png")
    pixels = load(tmp_path).pixels(torch.tensor([0]))[0, 0]
    assert np.abs(pixels.numpy().astype(int) - values.astype(int) // 256).max() <= 1


# fitting


def ramp(width: int, height: int, axis: str) -> Image.Image:
    """A picture whose value is its column (x) or row (y)."""
    values = np.broadcast_to(np.arange(width)[None] if axis == "x" else np.arange(height)[:, None], (height, width))
    return Image.fromarray(values.astype(np.uint8))


@pytest.mark.parametrize("fit", ["crop", "pad", "exact"])
def test_a_picture_that_fits_is_left_alone(fit: Any) -> None:
    original = ramp(16, 16, "x")
    assert fit_picture(original, 16, fit, "p") is original


@pytest.mark.parametrize(
    ("size", "axis", "first"),
    [((24, 16), "x", 4), ((16, 24), "y", 4), ((19, 16), "x", 1), ((16, 17), "y", 0), ((24, 16), "y", 0)],
)
def test_crop_takes_the_centre(size: tuple[int, int], axis: str, first: int) -> None:
    """The shorter side already fits, so nothing is resampled."""
    values = np.asarray(fit_picture(ramp(*size, axis), 16, "crop", "p"))
    expected = np.arange(first, first + 16)
    assert values.shape == (16, 16)
    np.testing.assert_array_equal(values, np.broadcast_to(expected if axis == "x" else expected[:, None], (16, 16)))


@pytest.mark.parametrize(("width", "height"), [(64, 48), (48, 64), (100, 33), (33, 33), (31, 200)])
def test_crop_resizes_the_shorter_side_and_keeps_the_aspect(width: int, height: int) -> None:
    shorter = min(width, height)
    for axis, length in (("x", width), ("y", height)):
        values = np.asarray(fit_picture(ramp(width, height, axis), 16, "crop", "p")).astype(float)
        line = values.mean(0 if axis == "x" else 1)
        # pixel k shows the middle of its share of the central `shorter` source pixels; borders see the filter's edge
        expected = (np.arange(16) + 0.5) * shorter / 16 + (length - shorter) / 2 - 0.5
        np.testing.assert_allclose(line[2:-2], expected[2:-2], atol=shorter / 32 + 0.5)


def test_crop_resamples_by_lanczos() -> None:
    original = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    expected = original.resize((24, 16), Image.Resampling.LANCZOS).crop((4, 0, 20, 16))
    np.testing.assert_array_equal(np.asarray(fit_picture(original, 16, "crop", "p")), np.asarray(expected))


@pytest.mark.parametrize(
    ("size", "box"),
    [((12, 12), (2, 2, 14, 14)), ((16, 10), (0, 3, 16, 13)), ((13, 16), (1, 0, 14, 16)), ((1, 1), (7, 7, 8, 8))],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pad_centres_on_black(size: tuple[int, int], box: tuple[int, int, int, int], mode: str) -> None:
    original = picture(200, size, mode)
    padded = fit_picture(original, 16, "pad", "p")
    assert (padded.size, padded.mode) == ((16, 16), mode)
    np.testing.assert_array_equal(np.asarray(padded.crop(box)), np.asarray(original))
    padded.paste(0 if mode == "L" else (0, 0, 0), box)
    assert not np.asarray(padded).any()


@pytest.mark.parametrize(
    ("fit", "size", "message"),
    [
        ("exact", (16, 17), "picture p has 16x17 pixels, the model 16x16; data.fit='crop' (--fit crop) resizes larger pictures, "
         "data.fit='pad' pads smaller ones"),
        ("exact", (8, 8), "picture p has 8x8 pixels, the model 16x16; data.fit='crop'"),
        ("pad", (17, 8), "picture p has 17x8 pixels, the model 16x16: data.fit='pad' cannot shrink it; "
         "use data.fit='crop' (--fit crop)"),
        ("crop", (40, 15), "picture p has 40x15 pixels, the model 16x16: it would have to be enlarged; use larger "
         "pictures, a model of lower resolution, or data.fit='pad' (--fit pad)"),
    ],
)  # fmt: skip
def test_pictures_that_do_not_fit_are_named(fit: Any, size: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError) as error:
        fit_picture(picture(0, size), 16, fit, "p")
    assert str(error.value).startswith(message)


def test_fit_reaches_the_data_set_and_its_errors_name_the_file(tmp_path: Path) -> None:
    ramp(20, 18, "x").save(tmp_path / "wide.png")
    assert load(tmp_path, fit="pad", resolution=20).pixels(torch.tensor([0]))[0, 0, :, 3].tolist() == [0, *[3] * 18, 0]
    assert load(tmp_path, resolution=18).pixels(torch.tensor([0]))[0, 0, 0].tolist() == list(range(1, 19))
    with pytest.raises(UserError, match=r"picture .*wide\.png has 20x18 pixels, the model 16x16; data\.fit='crop'"):
        load(tmp_path, fit="exact")


# every mistake is a sentence


def refused(images: Path | str, **arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        load(images, **arguments)
    return str(error.value)


def test_no_place_given() -> None:
    assert refused("") == "data.images is not set: name a folder of pictures, a parquet file or a hub data set"


@pytest.mark.parametrize("place", ["/no/such/folder", "./missing", "../missing", "a/b/c", "missing/x.parquet/y"])
def test_nothing_there(place: str) -> None:
    assert refused(place) == f"data.images={place}: no such folder or parquet file"


def test_a_single_picture_is_no_data_set(tmp_path: Path) -> None:
    write_values(tmp_path, {"1.png": 3})
    assert "1.png is a file of another kind than a folder or parquet file; " in refused(tmp_path / "1.png")


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    message = refused(tmp_path)
    assert message.startswith(
        f"data.images={tmp_path}: no picture in this folder, but 1 not pictures (.txt); pictures are .apng, "
    )
    assert ".png" in message


def test_an_unknown_split(pictures: Path) -> None:
    message = refused(pictures, split="validation")
    assert message == f"data.images={pictures} has the splits train and no split 'validation'"


def test_a_hub_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    columns: dict[str, list[Any]] = {"image": [encoded(7), encoded(9), encoded(11)], "label": [1, 0, 1]}
    write_parquet(tmp_path / "train-00000.parquet", features, columns)
    original, asked = datasets.load_dataset, list[Any]()

    def load_dataset(name: str, **options: Any) -> Any:
        asked.append((name, options))
        return original("parquet", data_dir=str(tmp_path), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset = load("me/pictures", num_classes=2)
    assert asked == [("me/pictures", {"split": "train"})]
    assert brightness(dataset) == [7, 9, 11]
    assert dataset.labels is not None
    assert (dataset.labels.tolist(), dataset.class_names) == ([1, 0, 1], ["cat", "dog"])


def test_a_hub_set_that_cannot_be_reached() -> None:
    message = refused("nobody/nothing")
    assert (
        "nobody/nothing (split 'train') is no file or folder here, and as a data set of the hub it cannot be read"
        in message
    )
    assert "\n" not in message


def test_a_broken_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but not really")
    assert refused(tmp_path / "x.parquet").startswith(
        f"data.images={tmp_path / 'x.parquet'} (split 'train') cannot be read: "
    )


def test_an_empty_parquet_file(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"image": datasets.Image()}, {"image": []})
    assert f"{path}: no rows, and so no pictures" in refused(path)


def test_no_column_of_pictures(tmp_path: Path) -> None:
    features = {"text": datasets.Value("string"), "number": datasets.Value("int64")}
    path = write_parquet(tmp_path / "x.parquet", features, {"text": ["a"], "number": [1]})
    assert refused(path) == f"data.images={path}: no column of pictures among ['number', 'text']"


def test_labels_are_needed_by_a_model_with_classes(with_metadata: Path) -> None:
    assert refused(with_metadata, num_classes=4, column="class") == (
        f"data.images={with_metadata}: the model has 4 classes but there is no column data.column='class' among "
        "['group', 'image', 'label', 'word']; sort the pictures into one folder a class, or add a metadata.jsonl"
    )


def test_labels_must_be_integers(with_metadata: Path) -> None:
    message = refused(with_metadata, num_classes=4, column="word")
    assert "column 'word' holds 'w0' for 0.png, not integer class labels" in message


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("int64", [0, 4], "labels run from 0 to 4, the model has 4 classes (0..3)"),
        ("int64", [-1, 2], "labels run from -1 to 2, the model has 4 classes (0..3)"),
        ("float32", [0.0, 1.0], "column 'label' holds '0.0' for row 0, not integer class labels"),
        ("int64", [0, None], "column 'label' holds 'None' for row 1, not integer class labels"),
    ],
)
def test_labels_that_do_not_suit_the_model(tmp_path: Path, kind: str, labels: list[Any], message: str) -> None:
    features = {"image": datasets.Image(), "label": datasets.Value(kind)}
    path = write_parquet(tmp_path / "x.parquet", features, {"image": [encoded(1), encoded(2)], "label": labels})
    assert refused(path, num_classes=4).partition(";")[0] == f"data.images={path}: {message}"


@pytest.mark.parametrize(
    "damage", [lambda data: b"no picture at all", lambda data: data[: len(data) // 2], lambda data: b""]
)
def test_a_damaged_picture_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "bad.png")
    (tmp_path / "bad.png").write_bytes(damage((tmp_path / "bad.png").read_bytes()))
    message = refused(tmp_path)
    assert message.startswith(f"picture {tmp_path / 'bad.png'} does not decode (")
    assert message.endswith("); replace or remove it")


def test_a_damaged_picture_without_a_file_is_named_by_its_row(tmp_path: Path) -> None:
    rows = [encoded(1), {"bytes": b"junk", "path": None}]
    path = write_parquet(tmp_path / "x.parquet", {"image": datasets.Image()}, {"image": rows})
    assert refused(path).startswith(f"picture row 1 of {path} does not decode (")


# order and batches


@pytest.mark.parametrize("length", [1, 7, 10])
def test_each_pass_is_a_permutation(length: int) -> None:
    rows = data_order(3, torch.arange(5 * length), length).reshape(5, length)
    for row in rows:
        assert sorted(row.tolist()) == list(range(length))


def test_passes_seeds_and_nothing_else_change_the_order() -> None:
    first, second = data_order(3, torch.arange(200), 100).split(100)
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.arange(100))
    assert torch.equal(data_order(3, torch.arange(100), 100), first)
    assert not torch.equal(data_order(4, torch.arange(100), 100), first)


def test_order_is_the_same_for_split_and_shuffled_positions() -> None:
    whole = data_order(1, torch.arange(35), 10)
    cache: dict[int, torch.Tensor] = {}
    parts = [data_order(1, part, 10, cache) for part in torch.arange(35).split(4)]
    assert torch.equal(torch.cat(parts), whole)
    backwards = [data_order(1, torch.tensor([i]), 10, cache) for i in range(34, -1, -1)]
    assert torch.equal(torch.cat(backwards).flip(0), whole)
    ranks = [data_order(1, torch.arange(35)[rank::2], 10) for rank in range(2)]
    assert torch.equal(torch.stack([ranks[0][:17], ranks[1]], 1).flatten(), whole[:34])


def test_order_keeps_only_the_last_permutations() -> None:
    cache: dict[int, torch.Tensor] = {}
    for position in range(0, 1000, 10):
        data_order(1, torch.arange(position, position + 10), 10, cache)
    assert len(cache) <= 2


@pytest.fixture
def coloured(tmp_path: Path) -> ImageDataset:
    """Seven pictures of random pixels: a mirrored one differs from every other."""
    return load(write_pictures(tmp_path, count=7, classes=2, channels=3), channels=3, num_classes=2)


def same(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_batches_are_pictures_in_the_unit_range_with_their_labels(coloured: ImageDataset) -> None:
    batches = ImageBatches(coloured, seed=5, batch_size=4, flip=False)
    for step in (0, 1, 2):  # step 1 spans two passes
        images, labels = batches.at(step, "cpu")
        rows = data_order(5, torch.arange(4 * step, 4 * step + 4), 7)
        assert images.dtype == torch.float32
        torch.testing.assert_close(images, coloured.pixels(rows).float() / 127.5 - 1)
        assert torch.equal(labels, coloured.labels[rows])
    everything = batches.at(0, "cpu")[0]
    assert everything.min() >= -1
    assert everything.max() <= 1


def test_black_and_white_are_the_ends_of_the_range(tmp_path: Path) -> None:
    dataset = load(write_values(tmp_path, {"1.png": 0, "2.png": 255}))
    images, labels = ImageBatches(dataset, seed=0, batch_size=2, flip=False).at(0, "cpu")
    assert sorted(images[:, 0, 0, 0].tolist()) == [-1, 1]
    assert labels.tolist() == [0, 0]


@pytest.mark.parametrize("flip", [False, True])
def test_a_batch_depends_on_its_step_alone(coloured: ImageDataset, flip: bool) -> None:
    straight = ImageBatches(coloured, 5, 4, flip)
    expected = [straight.at(step, "cpu") for step in range(8)]
    resumed = ImageBatches(coloured, 5, 4, flip)
    for step in range(3, 8):
        assert same(resumed.at(step, "cpu"), expected[step])
    jumping = ImageBatches(coloured, 5, 4, flip)
    for step in (6, 0, 0, 7, 1, 2, 5):
        assert same(jumping.at(step, "cpu"), expected[step])
    assert not same(ImageBatches(coloured, 6, 4, flip).at(0, "cpu"), expected[0])


def test_a_batch_may_be_larger_than_the_set(coloured: ImageDataset) -> None:
    images, _ = ImageBatches(coloured, 5, 20, flip=False).at(0, "cpu")
    rows = data_order(5, torch.arange(20), 7)
    torch.testing.assert_close(images, coloured.pixels(rows).float() / 127.5 - 1)


def test_pictures_in_memory_need_no_second_thread(coloured: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor operations in a second thread bring a second pool of compute threads, which slows the step by half."""
    threads: list[str] = []
    decode = coloured.pixels
    monkeypatch.setattr(
        coloured, "pixels", lambda rows: threads.append(threading.current_thread().name) or decode(rows)
    )
    batches = ImageBatches(coloured, 5, 4, flip=False)
    for step in range(3):
        batches.at(step, "cpu")
    batches._pool.shutdown(wait=True)
    assert threads == [threading.current_thread().name] * 3


def test_the_next_batch_is_decoded_in_the_background_and_once(
    coloured: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[int]]] = []
    decode = coloured.pixels

    def recording(rows: torch.Tensor) -> torch.Tensor:
        asked.append((threading.current_thread().name, rows.tolist()))
        return decode(rows)

    monkeypatch.setattr(coloured, "pixels", recording)
    monkeypatch.setattr(ImageDataset, "in_memory", property(lambda self: False))
    batches = ImageBatches(coloured, 5, 4, flip=False)
    for step in range(3):
        batches.at(step, "cpu")
    batches._pool.shutdown(wait=True)
    assert [rows for _, rows in asked] == data_order(5, torch.arange(16), 7).reshape(4, 4).tolist()
    assert asked[0][0] == threading.current_thread().name
    assert all(name.startswith("batch") for name, _ in asked[1:])


def test_flipping_mirrors_half_of_the_samples_by_their_own_draw(coloured: ImageDataset) -> None:
    plain, flipped = (ImageBatches(coloured, 5, 50, flip) for flip in (False, True))
    mirrored = 0
    for step in range(4):
        images, labels = plain.at(step, "cpu")
        other, other_labels = flipped.at(step, "cpu")
        assert torch.equal(labels, other_labels)
        draw = Draws(5, step, torch.arange(50 * step, 50 * step + 50)).uniform("data_flip")
        for row in range(50):
            expected = images[row].flip(2) if draw[row] < 0.5 else images[row]
            assert torch.equal(other[row], expected)
            mirrored += int(torch.equal(other[row], images[row].flip(2)))
    assert 70 < mirrored < 130


@pytest.mark.parametrize("label", [10**30, "1" * 40, 1.5, None, "cat"])
def test_labels_that_are_no_class_numbers(tmp_path: Path, label: object) -> None:
    (tmp_path / "a.png").write_bytes(encoded(7)["bytes"])
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "label": label}))
    assert "for a.png, not integer class labels" in refused(tmp_path, num_classes=4)


def test_damaged_pictures_are_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(9):
        Image.new("L", (16, 16), number).save(tmp_path / f"{number}.png")
    for number in (1, 3, 4, 5, 7, 8):
        (tmp_path / f"{number}.png").write_bytes(b"junk")
    words = f"6 of 9 pictures cannot be used: {', '.join(str(tmp_path / f'{number}.png') for number in (1, 3, 4, 5, 7))} and 1 more"
    message = refused(tmp_path)
    assert message.startswith(f"picture {tmp_path / '1.png'} does not decode (")
    assert message.endswith(words)
    monkeypatch.setattr("fewstep.data.images._MEMORY_LIMIT_BYTES", 0)  # a set that is too large to hold decoded
    dataset = load_images(DataSettings(images=str(tmp_path)), resolution=16, channels=1, num_classes=0)
    with pytest.raises(UserError) as error:
        dataset_features(SmallClassifier(1, 2, 4), dataset, batch_size=3)
    assert str(error.value).endswith(words)


def test_paths_in_a_table_are_from_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from where the command runs, which may have other pictures of these names."""
    write_values(tmp_path / "set" / "pictures", {"a.png": 40, "b.png": 80})
    write_values(tmp_path / "elsewhere" / "pictures", {"a.png": 1, "b.png": 2})
    columns = {"image": ["pictures/a.png", str(tmp_path / "set" / "pictures" / "b.png")]}
    table = write_parquet(tmp_path / "set" / "x.parquet", {"image": datasets.Value("string")}, columns)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert brightness(load(table)) == [40, 80]
    pictures = open_captioned_images(str(captioned(tmp_path / "set" / "y.parquet", columns["image"]))).rows(0)
    assert [Path(row.picture["path"]).parent for row in pictures] == [tmp_path / "set" / "pictures"] * 2


def captioned(path: Path, pictures: list[str]) -> Path:
    features = {"image": datasets.Value("string"), "text": datasets.Value("string")}
    return write_parquet(path, features, {"image": pictures, "text": ["x"] * len(pictures)})


@pytest.mark.parametrize(
    ("pictures", "told"),
    [
        (["https://example.org/a.png", "b.png"], "picture https://example.org/a.png is on another machine; download"),
        (["a" * 100_000, "b.png"], "aaa... of "), (["nothing.png", "b.png"], "is missing: there is no such file"),
        ([["a.png"], ["b.png"]], "column 'image' has lists, and each row is one picture"),
    ],
)  # fmt: skip
def test_what_is_no_picture_in_a_table_is_told_shortly(tmp_path: Path, pictures: list[Any], told: str) -> None:
    kind = datasets.List(datasets.Value("string")) if isinstance(pictures[0], list) else datasets.Value("string")
    table = write_parquet(tmp_path / "x.parquet", {"image": kind}, {"image": pictures})
    with pytest.raises(UserError) as looked:
        look_at_pictures(DataSettings(images=str(table)))
    for words in (refused(table), str(looked.value)):
        assert told in words
        assert len(words) < 1000 + 2 * len(str(tmp_path))


def test_looking_at_a_row_without_a_picture(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "x.parquet", {"image": datasets.Image()}, {"image": [None, encoded(1)]})
    with pytest.raises(UserError, match=r"row 0 of .* is missing: its row has neither bytes nor a path"):
        look_at_pictures(DataSettings(images=str(table)))


def test_tables_that_do_not_fit_together_say_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The library's own words are that an error occurred, and its log's lines are no sentence of ours."""
    for name in ("text", "caption"):
        write_parquet(
            tmp_path / f"{name}.parquet",
            {"image": datasets.Image(), name: datasets.Value("string")},
            {"image": [encoded(1)], name: ["x"]},
        )
    assert "are no one table: column 'caption' is in one of them alone" in refused(tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("labels", [[[0, 1], [1, 0]], [[0], [1, 0]], ["cat", "dog"], ["\xb2", "1"], ["--3", "1"]])
def test_labels_that_are_not_one_number_are_no_classes(tmp_path: Path, labels: list[Any]) -> None:
    """Of several labels the first was taken; odd digits were a traceback. A look tells why there are no classes."""
    kind = datasets.List(datasets.Value("int64")) if isinstance(labels[0], list) else datasets.Value("string")
    table = write_parquet(
        tmp_path / "x.parquet",
        {"image": datasets.Image(), "label": kind},
        {"image": [encoded(1), encoded(2)], "label": labels},
    )
    (tmp_path / "folder").mkdir()
    write_values(tmp_path / "folder", {"a.png": 1, "b.png": 2})
    rows = [{"file_name": name, "label": label} for name, label in zip(("a.png", "b.png"), labels, strict=True)]
    (tmp_path / "folder" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for place in (table, tmp_path / "folder"):
        look = look_at_pictures(DataSettings(images=str(place)))
        assert (look.num_classes, "not integer class labels" in look.unlabelled) == (0, True)
        assert "not integer class labels" in refused(place, num_classes=4)


def test_classes_are_numbered_as_another_set_names_them(tmp_path: Path) -> None:
    """A split without the first class has the labels of the others, not those of their places in it."""
    write_values(tmp_path, {"cat/a.png": 1, "dog/b.png": 2})
    dataset = load(tmp_path, num_classes=3)
    dataset.label_as(["bird", "dog", "cat"], "those of split train")
    assert dataset.labels is not None
    assert (dataset.labels.tolist(), dataset.class_names) == ([2, 1], ["bird", "dog", "cat"])
    with pytest.raises(UserError, match=r"class 'bird' of the pictures is none of those of the teacher \(dog, cat\)"):
        dataset.label_as(["dog", "cat"], "those of the teacher")
