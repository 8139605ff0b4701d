import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.data.noise_image_pairs import PAIRS, NoiseImagePairs, write_shard
from fewstep.data.shard_folder import MANIFEST, read_manifest, write_manifest
from fewstep.errors import UserError
from fewstep.formats.model_folder import ModelCard
from fewstep.models.model import build_model
from fewstep.preparation.pairs import prepare_pairs
from tests.conftest import tiny_denoiser

SHAPE = (3, 4, 5)


def some_pairs(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, *SHAPE, generator=generator),
        torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=generator),
        torch.randint(0, 10, (count,), generator=generator),
    )


Pairs = tuple[Tensor, Tensor, Tensor]


def write_folder(folder: Path, sizes: tuple[int, ...] = (3, 2), complete: bool = True) -> list[Pairs]:
    shards = [some_pairs(size, seed=number) for number, size in enumerate(sizes)]
    entries = [write_shard(folder, number, *shard) for number, shard in enumerate(shards)]
    write_manifest(folder, {"job": {"seed": 3}, "shards": entries, "complete": complete})
    return shards


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        NoiseImagePairs(folder)
    return str(error.value)


def test_round_trip(tmp_path: Path) -> None:
    shards = write_folder(tmp_path)
    pairs = NoiseImagePairs(tmp_path)
    noise, images, labels = (torch.cat(column) for column in zip(*shards, strict=True))
    assert len(pairs) == 5
    assert torch.equal(pairs.noise, noise.half())
    assert pairs.images.dtype == torch.uint8
    assert torch.equal(pairs.images, images)
    assert torch.equal(pairs.labels, labels)
    assert pairs.manifest == read_manifest(tmp_path, PAIRS)
    assert pairs.manifest["job"] == {"seed": 3}


def test_rows_are_ready_for_training(tmp_path: Path) -> None:
    shards = write_folder(tmp_path)
    noise, images, labels = (torch.cat(column) for column in zip(*shards, strict=True))
    index = torch.tensor([4, 0, 4])
    some_noise, some_images, some_labels = NoiseImagePairs(tmp_path).rows(index)
    assert some_noise.dtype == some_images.dtype == torch.float32
    assert torch.equal(some_noise, noise[index].half().float())
    torch.testing.assert_close(some_images, images[index].float() / 127.5 - 1)
    assert some_images.min() >= -1
    assert some_images.max() <= 1
    assert some_labels.dtype == torch.int64
    assert torch.equal(some_labels, labels[index])


def test_the_manifest_counts_rows_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    write_folder(tmp_path, sizes=(3, 2, 1))
    entries = read_manifest(tmp_path, PAIRS)["shards"]
    assert [(entry["file"], entry["rows"]) for entry in entries] == [
        ("pairs_00000.safetensors", 3), ("pairs_00001.safetensors", 2), ("pairs_00002.safetensors", 1),
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {MANIFEST, *(entry["file"] for entry in entries)}


def test_rewriting_the_manifest_replaces_it(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"shards": [], "complete": False})
    write_manifest(tmp_path, {"shards": [], "complete": True})
    assert read_manifest(tmp_path, PAIRS) == {"shards": [], "complete": True}


@pytest.mark.parametrize("make", [True, False])
def test_a_folder_without_pairs(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "pairs"
    if make:
        folder.mkdir()
    assert refused(folder) == f"{folder} holds no noise-image pairs; make them with `fewstep prepare pairs`"


@pytest.mark.parametrize("content", [b"", b'{"shards": [', b"\xff\xfe", b'"text"', b"[1, 2"])
def test_a_damaged_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path / MANIFEST} is damaged")
    assert message.endswith("; delete the folder and prepare the pairs again")


@pytest.mark.parametrize(
    "content", ["{}", "3", "null", "[1, 2]", '{"complete": true}', '{"complete": true, "shards": [{}]}']
)
def test_a_manifest_of_another_kind(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    assert "is damaged" in refused(tmp_path)


def test_a_manifest_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).mkdir()
    assert "cannot be read (" in refused(tmp_path)


def test_an_unfinished_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, complete=False)
    expected = f"{tmp_path} is unfinished: run the same `fewstep prepare pairs` command again to complete it"
    assert refused(tmp_path) == expected


ADVICE = r"run the same `fewstep prepare pairs` command again"


def test_a_missing_shard(tmp_path: Path) -> None:
    write_folder(tmp_path)
    path = tmp_path / "pairs_00001.safetensors"
    path.unlink()
    assert re.match(rf"{re.escape(str(path))} cannot be read \(.*No such file.*\); {ADVICE}", refused(tmp_path))


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: b""]
)
def test_a_changed_shard(tmp_path: Path, damage: Any) -> None:
    write_folder(tmp_path)
    path = tmp_path / "pairs_00000.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    expected = rf"{re.escape(str(path))} is not the file that was written \(checksum differs\); {ADVICE}"
    assert re.match(expected, refused(tmp_path))


def test_a_shard_that_is_no_safetensors_file_though_it_is_the_one_written(tmp_path: Path) -> None:
    path = tmp_path / "pairs_00000.safetensors"
    path.write_bytes(b"not tensors")
    entry = {"file": path.name, "rows": 1, "sha256": hashlib.sha256(b"not tensors").hexdigest()}
    write_manifest(tmp_path, {"shards": [entry], "complete": True})
    assert re.match(rf"{re.escape(str(path))} cannot be read \(.*\); {ADVICE}", refused(tmp_path))


def test_a_shard_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        write_shard(tmp_path / "missing", 0, *some_pairs(1))
    with pytest.raises(UserError, match="cannot write"):
        write_manifest(tmp_path / "missing", {})


def test_a_manifest_on_disk_is_plain_json(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert json.loads((tmp_path / MANIFEST).read_text())["complete"] is True


def test_the_advice_for_a_missing_shard_can_be_followed(tmp_path: Path) -> None:
    teacher = build_model(tiny_denoiser(), ModelCard(role="teacher"))
    for _ in range(2):
        prepare_pairs(teacher, "tiny", tmp_path, num_pairs=2, shard_size=1, num_steps=2)
        path = tmp_path / "pairs_00000.safetensors"
        assert path.exists()
        path.unlink()
    assert "run the same `fewstep prepare pairs` command again" in refused(tmp_path)
