"""Features of real pictures are computed once: another picture, network or fit is another entry, a damaged one is made again."""

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

import fewstep
from fewstep.errors import UserError
from fewstep.evaluation import real_pictures
from fewstep.evaluation.coco import load_coco
from fewstep.evaluation.feature_cache import (
    cache_folder,
    content_digest,
    feature_key,
    keep_features,
    kept_features,
    network_digest,
)
from fewstep.evaluation.features import SmallClassifier
from fewstep.evaluation.protocols import PROTOCOLS
from fewstep.evaluation.real_pictures import features_of_coco, features_of_images
from fewstep.settings import DataSettings
from tests.cli.test_main import fewstep as run
from tests.conftest import write_pictures
from tests.evaluation.test_protocols import coco as coco  # a fixture
from tests.training.helpers import tiny_train_settings

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/fewstep/features"


def network(seed: int = 0, channels: int = 1) -> SmallClassifier:
    torch.manual_seed(seed)
    return SmallClassifier(channels, 4, width=4, name="tiny").eval()


class Asked:
    """Features of a folder of grey pictures, and how often they were computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made, self.console = 0, Console(file=io.StringIO(), width=400)
        original = real_pictures.load_images

        def load(*arguments: Any, **options: Any) -> Any:
            self.made += 1
            return original(*arguments, **options)

        monkeypatch.setattr(real_pictures, "load_images", load)

    def __call__(
        self, folder: Path, *, own: SmallClassifier | None = None, cache: bool = True, **settings: Any
    ) -> Tensor:
        place = DataSettings(images=str(folder), **settings)
        return features_of_images(place, (1, 16, 16), own or network(), CPU, self.console, cache)

    @property
    def said(self) -> str:
        return str(self.console.file.getvalue())  # type: ignore[attr-defined]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def test_the_second_time_they_are_read(asked: Asked, tmp_path: Path, cache: Path) -> None:
    folder = write_pictures(tmp_path / "a")
    first = asked(folder)
    assert (asked.made, len(list(cache.iterdir()))) == (1, 1)
    assert asked.said == ""
    assert torch.equal(asked(folder), first)
    shutil.move(folder, tmp_path / "moved")  # the place does not count
    assert torch.equal(asked(tmp_path / "moved"), first)
    assert asked.made == 1
    assert f"Features of 24 real pictures from {cache}" in asked.said


def test_anything_else_is_computed(asked: Asked, tmp_path: Path, cache: Path) -> None:
    folder = write_pictures(tmp_path / "a")
    first = asked(folder)
    others = [
        asked(folder, own=network(1)), asked(folder, fit="pad", background="white"), asked(folder, split="train", background="black"),
    ]  # fmt: skip
    assert asked.made == 4
    assert not torch.equal(others[0], first)
    path = sorted(folder.rglob("*.png"))[0]
    size = path.stat().st_size
    facts = os.stat(path)
    raw = bytearray(path.read_bytes())
    Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    path.write_bytes(path.read_bytes().ljust(size, b"\0")[: max(size, len(raw))])
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # neither size nor time gives it away
    changed = asked(folder)
    assert asked.made == 5
    assert not torch.equal(changed[0], first[0])
    assert torch.equal(changed[1:], first[1:])


def test_without_the_cache(asked: Asked, tmp_path: Path, cache: Path) -> None:
    folder = write_pictures(tmp_path / "a")
    asked(folder, cache=False)
    asked(folder, cache=False)
    assert asked.made == 2
    assert not cache.exists()


def spoil_bytes(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)


def spoil_length(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def spoil_all(path: Path) -> None:
    path.write_bytes(b"")


def spoil_place(path: Path) -> None:
    """Another entry under this one's name."""
    keep_features("0" * 64, {"features": torch.zeros(24, 16)})
    os.replace(cache_folder() / ("0" * 32 + ".safetensors"), path)


@pytest.mark.parametrize("spoil", [spoil_bytes, spoil_length, spoil_all, spoil_place])
def test_damaged_ones_are_made_again(asked: Asked, tmp_path: Path, cache: Path, spoil: Callable[[Path], None]) -> None:
    folder = write_pictures(tmp_path / "a")
    first = asked(folder)
    (path,) = cache.iterdir()
    good = path.read_bytes()
    spoil(path)
    assert torch.equal(asked(folder), first)
    assert asked.made == 2
    assert "is damaged and made again" in asked.said
    assert path.read_bytes() == good


def test_a_cache_that_cannot_be_written_stops_nobody(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in its place")
    folder = write_pictures(tmp_path / "a")
    assert asked(folder).shape == (24, 16)
    assert "features are not kept in" in asked.said


def test_networks_without_weights_have_no_entry() -> None:
    class Means:
        name = "means"

        def __call__(self, images: Tensor) -> Tensor:
            return images.mean((2, 3))

    assert network_digest(Means()) == ""
    assert feature_key(Means(), "content", {}, "cpu") == ""
    assert kept_features("") is None
    assert network_digest(network()) == network_digest(network()) != network_digest(network(1))


def test_content_is_names_and_bytes_in_order(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "2"), (".hidden", "3")):
        (tmp_path / name).write_text(text)
    told: list[tuple[int, int]] = []
    found = content_digest(tmp_path, report=lambda *at: told.append(at))
    assert found == content_digest(tmp_path, ["a", "b"]) != content_digest(tmp_path, ["b", "a"])
    assert told == [(0, 2), (1, 2)]
    (tmp_path / "a").write_text("2")
    assert content_digest(tmp_path) != found
    assert content_digest(tmp_path / "a") == content_digest(tmp_path / "b")  # a file's own name does not count
    with pytest.raises(UserError, match="cannot be read"):
        content_digest(tmp_path, ["nothing"])


def test_coco_pictures_are_decoded_once(coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = load_coco(coco / "captions_val2014.json", coco / "val2014")
    pictures = type(pictures)(pictures.root, pictures.paths[:4], pictures.captions[:4])
    console, own = Console(file=io.StringIO()), network(channels=3)
    first = features_of_coco(PROTOCOLS["coco30k-256"], pictures, own, CPU, console)
    assert first["frechet_distance"].shape == (4, 16)
    monkeypatch.setattr(type(pictures), "pixels", None)  # nothing is decoded, not even checked
    again = features_of_coco(PROTOCOLS["coco30k-256"], pictures, own, CPU, console)
    assert torch.equal(again["frechet_distance"], first["frechet_distance"])
    with pytest.raises(TypeError):  # another protocol sees other pixels
        features_of_coco(PROTOCOLS["coco10k-512"], pictures, own, CPU, console)


def test_statistics_know_the_weights_of_their_features(teacher_folder: Path, pictures: Path, tmp_path: Path) -> None:
    """Features trained anew are as many as before and compare nothing: refused by `evaluate` and by `best.files`."""
    nets = [tmp_path / "before", tmp_path / "anew"]
    for seed, folder in enumerate(nets):
        torch.manual_seed(seed)
        SmallClassifier(1, 4, width=4, num_stages=1).save(folder)
    reference = tmp_path / "reference.npz"
    answer = run(
        "prepare", "statistics", pictures, reference, "--features", nets[0], "--resolution", 16, "--channels", 1
    )
    assert answer.code == 0, answer.err
    measure = ("evaluate", teacher_folder, "--reference", reference, "--num-images", 4, "--teacher-steps", 2)
    assert run(*measure, "--device", "cpu", "--features", nets[0]).code == 0
    answer = run(*measure, "--device", "cpu", "--features", nets[1])
    assert (answer.code, "was made with another feature network than" in answer.err) == (2, True)
    best = {"files": [str(nets[1]), str(reference)]}
    settings = tiny_train_settings(teacher_folder, pictures, tmp_path / "run", best=best)
    with pytest.raises(UserError, match=r"best\.files: .* was made with another feature network than"):
        fewstep.train(settings)
