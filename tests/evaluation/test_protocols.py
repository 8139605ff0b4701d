"""Protocols by name: COCO's against a pipeline written by hand, clean-fid's resize to the last bit, proxies that say so, refusals."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.coco import CaptionedPictures, load_coco
from fewstep.evaluation.measure import Clocked
from fewstep.evaluation.measurement import Measurement, Value
from fewstep.evaluation.protocols import (
    INCEPTION,
    PROTOCOLS,
    central,
    cleanly_resized,
    coco_features,
    coco_figure,
    coco_look,
    protocol_named,
    reduced,
    truncated,
)
from tests.cli.test_main import fewstep
from tests.export.text_generators import write_run

EMOJI = ("--features", "bundled:emoji", "--device", "cpu")


class Pooled:
    """Features one can compute by hand: 2x2 block means of what Inception would see."""

    name = "block means"

    def __call__(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, 299, 299)
        levels = (images.double() + 1) * 127.5
        assert torch.allclose(levels, levels.round(), atol=1e-4)  # 8 bits
        return torch.nn.functional.adaptive_avg_pool2d(levels.round()[..., :298, :298] / 127.5 - 1, 2).flatten(1)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 pictures under COCO's file names, one of them grey, and a captions file of its layout with two captions each."""
    folder, random = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    (folder / "val2014").mkdir()
    images: list[Any] = []
    annotations: list[Any] = []
    for number in range(30):
        height, width = int(random.integers(300, 340)), int(random.integers(300, 340))
        coarse = random.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        name, key = f"COCO_val2014_{number * 7 + 42:012d}.jpg", number * 7 + 42
        (picture.convert("L") if number == 4 else picture).save(folder / "val2014" / name, quality=95)
        images.append({"id": key, "file_name": name, "height": height, "width": width})
        for which in (1, 0):
            annotations.append({"id": 2 * number + which, "image_id": key, "caption": f"Caption {which} of {key}. "})
    whole = {"info": {}, "licenses": [], "images": images[::-1], "annotations": annotations}
    (folder / "captions_val2014.json").write_text(json.dumps(whole))
    return folder


def made(first: int, count: int) -> Tensor:
    """Pictures of a generator: smooth, some values beyond [-1, 1]."""
    coarse = torch.stack([torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(n)) for n in range(64)])
    return torch.nn.functional.interpolate(coarse[first : first + count], size=(320, 320), mode="bicubic")


def by_hand(pictures: list[Image.Image], side: int, patch: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance in float64 of the block means, every step written out."""
    rows = []
    for picture in pictures:
        width, height = picture.size
        short = min(width, height)
        left, top = (width - short) // 2, (height - short) // 2
        small = picture.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.LANCZOS)
        if patch:
            low = (side - 299) // 2
            seen = np.array(small.crop((low, low, low + 299, low + 299)))
        else:
            floats = [
                np.array(band.convert("F").resize((299, 299), Image.Resampling.BICUBIC)) for band in small.split()
            ]
            seen = np.floor(np.clip(np.stack(floats, axis=2), 0, 255))
        x = seen.astype(np.float64)[:298, :298] / 127.5 - 1
        rows.append(x.reshape(2, 149, 2, 149, 3).mean((1, 3)).transpose(2, 0, 1).ravel())
    features = np.stack(rows)
    return features.mean(0), np.cov(features.T)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coco30k-256", pytest.param("coco10k-512", marks=pytest.mark.long)])
def test_coco_protocol_equals_a_pipeline_by_hand(coco: Path, name: str) -> None:
    real, protocol = load_coco(coco / "captions_val2014.json", coco / "val2014"), PROTOCOLS[name]
    clocked = Clocked(made, 20, 8)
    rows = clocked.seen(coco_look(protocol, Pooled()))
    found = coco_figure(
        protocol, "g", rows, coco_features(protocol, real, Pooled()), Pooled(), clocked.images_per_second,
        evaluations_per_image=4, seed=0,
    )  # fmt: skip
    pixels = np.floor((made(0, 20).clamp(-1, 1).numpy() + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
    generated = [Image.fromarray(one.transpose(1, 2, 0)) for one in pixels]
    files = sorted((coco / "val2014").iterdir())
    pictures = [Image.open(path).convert("RGB") for path in files]
    expected = {"frechet_distance": False} | ({"patch_distance": True} if protocol.has_patches else {})
    assert found.values.keys() == {*expected, "images_per_second"}
    for value, patch in expected.items():
        (m, s), (n, t) = by_hand(pictures, protocol.side, patch), by_hand(generated, protocol.side, patch)
        root = scipy.linalg.sqrtm(s @ t).real
        distance = ((m - n) ** 2).sum() + np.trace(s + t - 2 * root)
        assert found[value] == pytest.approx(distance, rel=1e-6)
    assert (found.num_images, found.num_reference_images, found.num_features) == (20, 30, 12)


@pytest.mark.slow
def test_pictures_go_through_the_network_32_at_a_time(coco: Path) -> None:
    real = load_coco(coco / "captions_val2014.json", coco / "val2014")
    twice = CaptionedPictures(real.root, real.paths[:20] * 2, real.captions[:20] * 2)
    sizes: list[int] = []

    class Counting(Pooled):
        def __call__(self, images: Tensor) -> Tensor:
            sizes.append(len(images))
            return super().__call__(images)

    told: list[tuple[int, int]] = []
    found = coco_features(PROTOCOLS["coco30k-256"], twice, Counting(), report=lambda *at: told.append(at))
    assert sizes == [32, 8]
    torch.testing.assert_close(found["frechet_distance"][:20], found["frechet_distance"][20:])  # in their order
    assert told == [(0, 40), (32, 40), (40, 40)]


def test_pictures_are_what_a_viewer_shows(tmp_path: Path) -> None:
    """Turned upright and on white, as those of every other command."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (20, 10), (0, 255, 0, 0)).save(tmp_path / "a.png", exif=exif)
    pixels = CaptionedPictures(tmp_path, [tmp_path / "a.png"], ["a"]).pixels(0)
    np.testing.assert_array_equal(pixels, np.full((20, 10, 3), 255))


def test_captions_are_those_of_the_lowest_id(coco: Path) -> None:
    real = load_coco(coco / "captions_val2014.json", coco / "val2014")
    assert real.captions == [f"Caption 0 of {number * 7 + 42}." for number in range(30)]
    assert [path.name for path in real.paths] == sorted(path.name for path in (coco / "val2014").iterdir())
    assert real.pixels(4).shape[2] == 3


GOLDEN = {  # sha256 of what clean-fid 0.1.35, build_resizer("clean"), makes of `pattern`, float32
    (256, 256): "0af281842a3054ca69ea62a69190689cb0c43793c55006821a516a3f0522b3b7",
    (512, 512): "b9aee90261325d8f9f661902fa2ebdcd2f87e78b87349cb62ae5d94b7a144036",
    (31, 47): "65ca72d35d0f9ceaafa0994f2ead881d157218a4c414bf68931ac8c92b98c814",
}


@pytest.mark.parametrize("shape", GOLDEN)
def test_resize_is_clean_fids_to_the_last_bit(shape: tuple[int, int]) -> None:
    y, x, c = np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), np.arange(3), indexing="ij")
    pattern = ((x * 7 + y * 13 + c * 29 + (x * y) % 31 * 5) % 256).astype(np.uint8)
    found = cleanly_resized(pattern)
    assert (found.shape, found.dtype) == ((299, 299, 3), np.float32)
    assert hashlib.sha256(found.tobytes()).hexdigest() == GOLDEN[shape]


def test_crop_and_rounding() -> None:
    rows = np.arange(4 * 7 * 3, dtype=np.uint8).reshape(4, 7, 3)
    assert np.array_equal(central(rows, 4), rows[:, 1:5])
    assert np.array_equal(reduced(rows, 4), rows[:, 1:5])  # nothing to resize
    levels = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert truncated(levels)[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]


def figure(**changes: Any) -> Measurement:
    facts: dict[str, Any] = {
        "num_images": 30_000, "features": INCEPTION, "num_features": 2048, "num_reference_images": 40_504, **changes,
    }  # fmt: skip
    count = facts["num_images"]
    return Measurement(
        "g", {"frechet_distance": Value(9.0, count), "images_per_second": Value(1, count)}, evaluations_per_image=4,
        **facts,
    )  # fmt: skip


def test_a_whole_protocol_is_no_proxy() -> None:
    found = PROTOCOLS["coco30k-256"].labelled(figure(), "6726825d" + "0" * 56, (3, 512, 512))
    assert (found.protocol, found.proxy) == ("coco30k-256", "")
    assert found.sentence().startswith("protocol coco30k-256: g: Frechet distance 9.000")
    assert Measurement.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(
    ("changes", "digest", "size", "words"),
    [
        ({"num_images": 29_999}, "6726825d", 512, "29,999 images, not 30,000"),
        ({"features": "emoji"}, "", 512, f"features emoji, not {INCEPTION}"),
        ({}, "deadbeef00", 512, "Inception weights of sha256 deadbeef, not 6726825d"),
        ({"seed": 3}, "6726825d", 512, "seed 3, not 0"),
        ({"num_reference_images": 30}, "6726825d", 512, "30 real images, not 40,504"),
        ({}, "6726825d", 64, "pictures of 64x64, not 512x512"),
    ],
)
def test_anything_else_is_labelled_a_proxy(changes: dict[str, Any], digest: str, size: int, words: str) -> None:
    found = PROTOCOLS["coco30k-256"].labelled(figure(**changes), digest, (3, size, size))
    assert found.proxy == words
    assert found.sentence().startswith(f"PROXY of coco30k-256 ({words}): g: ")
    assert found.to_dict()["proxy"] == words
    assert Measurement.from_dict(found.to_dict()) == found


@pytest.mark.parametrize(
    ("channels", "num_real", "words"),
    [
        (3, 0, ""), (3, 50_000, ""), (3, 10_000, "10,000 real images, not 50,000"), (1, 0, "grey pictures, not colour"),
    ],
)  # fmt: skip
def test_references_that_say_of_what_they_are(channels: int, num_real: int, words: str) -> None:
    """Published ones do not; those of `prepare statistics` do."""
    found = figure(num_images=50_000, num_reference_images=num_real)
    assert PROTOCOLS["cifar10-50k"].labelled(found, "6726825d", (channels, 32, 32)).proxy == words


@pytest.mark.slow
def test_evaluate_a_coco_protocol(coco: Path, tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run", "sd", (999, 499)), tmp_path / "figure.json"
    whole = json.loads((coco / "captions_val2014.json").read_text())
    whole["images"] = whole["images"][:4]
    (tmp_path / "c.json").write_text(json.dumps(whole))
    place = ("--captions", tmp_path / "c.json", "--images", coco / "val2014")
    answer = fewstep(
        "evaluate", run, "--protocol", "coco30k-256", *place, *EMOJI, "--num-images", 3, "--json", out
    )  # fmt: skip
    assert answer.code == 0, answer.err
    found = json.loads(out.read_text())
    assert answer.out.startswith(f"PROXY of coco30k-256 ({found['proxy']}): ")
    assert "3 images, not 30,000" in found["proxy"]
    assert "4 real images, not 40,504" in found["proxy"]
    assert "3 images are fewer than a Frechet distance in" in answer.err
    assert found["warnings"] == [line for line in answer.err.splitlines() if "are fewer than" in line]
    asked = {"features": "bundled:emoji", "captions": str(tmp_path / "c.json"), "num_prompts": 4, "batch_size": 4}
    assert asked.items() <= found["settings"].items()


def spoil_layout(whole: dict[str, Any]) -> None:
    del whole["annotations"]


def spoil_twice(whole: dict[str, Any]) -> None:
    whole["images"].append(whole["images"][0])


def spoil_silent(whole: dict[str, Any]) -> None:
    whole["annotations"] = whole["annotations"][2:]


def spoil_missing(whole: dict[str, Any]) -> None:
    whole["images"][3]["file_name"] = "other.jpg"


def spoil_few(whole: dict[str, Any]) -> None:
    whole["images"] = whole["images"][:1]


def spoil_caption(whole: dict[str, Any]) -> None:
    whole["annotations"][0]["caption"] = None


def spoil_id(whole: dict[str, Any]) -> None:
    whole["images"][0]["id"] = float("inf")


def spoil_place(whole: dict[str, Any]) -> None:
    whole["images"][3]["file_name"] = "../other.jpg"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_caption, "caption is 'None'; give captions_val2014.json"), (spoil_id, "id is 'inf'; give captions_val2014.json"),
        (spoil_place, r"names '\.\./other\.jpg', which is not below a folder"),
        (spoil_layout, "is no captions file of COCO's layout"), (spoil_twice, "lists a picture twice"),
        (spoil_silent, "1 pictures have no caption, COCO_val2014_000000000042.jpg first"),
        (spoil_missing, "lacks 1 of 30 pictures of"), (spoil_few, "lists 1 pictures; a distance takes at least 2"),
    ],
)  # fmt: skip
def test_captions_files_that_are_refused(
    coco: Path, tmp_path: Path, spoil: Callable[[dict[str, Any]], None], words: str
) -> None:
    whole = json.loads((coco / "captions_val2014.json").read_text())
    spoil(whole)
    (tmp_path / "c.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match=words) as error:
        load_coco(tmp_path / "c.json", coco / "val2014")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]"])
def test_what_is_no_captions_file_at_all(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match="is no captions file of COCO's layout"):
        load_coco(tmp_path / "c.json", tmp_path)


def test_corrupt_pictures_are_counted_and_named(coco: Path, tmp_path: Path) -> None:
    for path in (coco / "val2014").iterdir():
        whole = path.read_bytes()
        (tmp_path / path.name).write_bytes(
            whole[: len(whole) // 2] if path.name.endswith(("42.jpg", "63.jpg")) else whole
        )
    with pytest.raises(
        UserError, match=r"2 of 30 pictures cannot be read \(COCO_val2014_000000000042.jpg, COCO_.*63.jpg\)"
    ):
        load_coco(coco / "captions_val2014.json", tmp_path).check()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--protocol", "coco30k"), "--protocol coco30k: choose from imagenet64-edm, cifar10-50k, coco30k-256"),
        (("--protocol", "coco30k-256", "--images", "x"), "--protocol coco30k-256 takes --captions captions_val2014.json"),
        (("--captions", "c.json", "--images", "x"), "--captions belongs to the COCO protocols"),
        (("--protocol", "cifar10-50k", "--images", "x"), "--protocol cifar10-50k takes the published --reference"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(options: tuple[str, ...], words: str) -> None:
    answer = fewstep("evaluate", "nowhere", *EMOJI, *options)
    assert (answer.code, answer.out) == (2, "")
    assert words in answer.err


def test_custom_pins_nothing() -> None:
    assert protocol_named("custom") is None
