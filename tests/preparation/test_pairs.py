"""Noise-image pairs are the teacher's own samples, and an interrupted job ends in the same bytes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.data.noise_image_pairs import NoiseImagePairs
from fewstep.data.shard_folder import MANIFEST
from fewstep.diffusion.condition import Condition
from fewstep.diffusion.samplers import sample_heun
from fewstep.errors import UserError
from fewstep.formats.model_folder import ModelCard
from fewstep.formats.pixels import to_uint8
from fewstep.models.load import load_teacher
from fewstep.models.model import Model, build_model
from fewstep.preparation import pairs as pairs_module
from fewstep.preparation import shards
from fewstep.preparation.pairs import prepare_pairs
from tests.conftest import tiny_denoiser

JOB: dict[str, Any] = {"num_pairs": 10, "seed": 4, "num_steps": 2, "shard_size": 4, "batch_size": 3}


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Model:
    return load_teacher(teacher_folder, device="cpu")


@pytest.fixture(scope="module")
def whole(teacher: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job nobody interrupted: shards of 4, 4 and 2 pairs."""
    return prepare_pairs(teacher, "teacher", tmp_path_factory.mktemp("pairs") / "whole", **JOB)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def images_by_heun(teacher: Model, pairs: NoiseImagePairs, **options: Any) -> Tensor:
    condition = Condition.from_labels(pairs.labels, teacher.denoiser.num_classes)
    images = sample_heun(teacher.denoiser, pairs.noise.float(), condition, **options)
    return to_uint8(images)


def assert_same_pictures(actual: Tensor, expected: Tensor) -> None:
    """Equal up to one grey level where float32 rounding of another batch size tips it."""
    difference = (actual.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.01


@pytest.mark.slow
def test_stored_noise_makes_the_stored_image(teacher: Model, whole: Path) -> None:
    pairs = NoiseImagePairs(whole)
    assert (pairs.noise.dtype, pairs.images.dtype, len(pairs)) == (torch.float16, torch.uint8, 10)
    assert_same_pictures(pairs.images, images_by_heun(teacher, pairs, num_steps=2))
    others = images_by_heun(teacher, pairs, num_steps=5)
    assert (pairs.images.int() - others.int()).abs().float().mean() > 1  # the comparison can fail


def test_labels_and_noises_are_spread(teacher: Model, tmp_path: Path) -> None:
    folder = prepare_pairs(teacher, "teacher", tmp_path, num_pairs=200, seed=1, num_steps=1, batch_size=200)
    pairs = NoiseImagePairs(folder)
    counts = torch.bincount(pairs.labels, minlength=4)
    assert counts.min() > 25
    assert abs(float(pairs.noise.float().mean())) < 0.02
    assert abs(float(pairs.noise.float().std()) - 1) < 0.02
    assert len(pairs.noise.flatten(1).unique(dim=0)) == 200


def test_guided_pairs(teacher: Model, tmp_path: Path) -> None:
    folder = prepare_pairs(
        teacher, "teacher", tmp_path, num_pairs=3, seed=4, num_steps=2, guidance_scale=3.0, batch_size=3
    )
    pairs = NoiseImagePairs(folder)
    assert_same_pictures(pairs.images, images_by_heun(teacher, pairs, num_steps=2, guidance_scale=3.0))
    assert not torch.equal(pairs.images, images_by_heun(teacher, pairs, num_steps=2))


def test_teacher_without_classes(tmp_path: Path) -> None:
    free = build_model(tiny_denoiser(num_classes=0), ModelCard("teacher"))
    pairs = NoiseImagePairs(prepare_pairs(free, "free", tmp_path, num_pairs=3, num_steps=2))
    assert pairs.labels.tolist() == [0, 0, 0]
    assert_same_pictures(pairs.images, images_by_heun(free, pairs, num_steps=2))


def test_progress_is_reported(teacher: Model, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    prepare_pairs(teacher, "teacher", tmp_path, **JOB, report=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 10), (4, 10), (7, 10), (8, 10), (10, 10)]


class Interrupted(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize(("finished", "last_batch"), [(0, 3), (1, 7), (2, 8)])
def test_an_interrupted_job_ends_in_the_same_bytes(
    teacher: Model, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int, last_batch: int
) -> None:
    """Interrupted while the shard after `finished` whole ones is made; what is done is not made again."""
    folder = tmp_path / "parts"
    original, calls, resumed = pairs_module._some_pairs, [], []

    def counted(*arguments: Any) -> Any:
        first = int(arguments[2].positions[0])  # the first pair of the batch
        calls.append(first)
        if not resumed and first == last_batch:
            raise Interrupted
        return original(*arguments)

    monkeypatch.setattr(pairs_module, "_some_pairs", counted)
    with pytest.raises(Interrupted):
        prepare_pairs(teacher, "teacher", folder, **JOB)
    with pytest.raises(UserError, match="is unfinished: run the same `fewstep prepare pairs` command again"):
        NoiseImagePairs(folder)
    resumed.append(len(calls))
    prepare_pairs(teacher, "teacher", folder, **JOB)
    assert calls[resumed[0]] == 4 * finished
    assert files_of(folder) == files_of(whole)


def test_a_job_killed_between_shard_and_manifest(
    teacher: Model, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard the manifest does not know yet is made again."""
    folder, original = tmp_path / "parts", shards.write_manifest

    def interrupted(folder: Path, manifest: dict[str, Any]) -> None:
        if len(manifest["shards"]) == 2:
            raise Interrupted
        original(folder, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_manifest", interrupted)
        with pytest.raises(Interrupted):
            prepare_pairs(teacher, "teacher", folder, **JOB)
    prepare_pairs(teacher, "teacher", folder, **JOB)
    assert files_of(folder) == files_of(whole)


def test_a_finished_job_does_nothing(teacher: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_pairs(teacher, "teacher", tmp_path, **JOB)
    before = files_of(tmp_path)
    monkeypatch.setattr(pairs_module, "_some_pairs", None)  # calling it would fail
    prepare_pairs(teacher, "teacher", tmp_path, **JOB)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_damaged_shard_is_refused_and_remade(teacher: Model, whole: Path, tmp_path: Path, shard: int) -> None:
    """One flipped bit is noticed on loading, and the command the message names repairs it."""
    prepare_pairs(teacher, "teacher", tmp_path, **JOB)
    path = tmp_path / f"pairs_{shard:05d}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"pairs_{shard:05d}\.safetensors is not the file .*`fewstep prepare pairs`"):
        NoiseImagePairs(tmp_path)
    prepare_pairs(teacher, "teacher", tmp_path, **JOB)
    assert files_of(tmp_path) == files_of(whole)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_pairs": 11}, "num_pairs was 10, is 11"), ({"seed": 5}, "seed was 4, is 5"),
        ({"num_steps": 3}, "num_steps was 2, is 3"), ({"guidance_scale": 2.0}, "guidance_scale was 1.0, is 2.0"),
        ({"shard_size": 5}, "shard_size was 4, is 5"),
    ],
)  # fmt: skip
def test_other_settings_are_refused(teacher: Model, whole: Path, changes: dict[str, Any], told: str) -> None:
    before = files_of(whole)
    with pytest.raises(UserError) as error:
        prepare_pairs(teacher, "teacher", whole, **{**JOB, **changes})
    assert str(error.value) == f"{whole} holds other pairs: {told}; choose another folder"
    assert files_of(whole) == before


def test_another_teacher_is_refused(teacher: Model, whole: Path) -> None:
    other = build_model(tiny_denoiser(num_classes=4), ModelCard("teacher"))
    with torch.no_grad():
        next(other.denoiser.parameters()).add_(1)
    with pytest.raises(UserError, match=r"network was '[0-9a-f]{64}', is '[0-9a-f]{64}'"):
        prepare_pairs(other, "teacher", whole, **JOB)
    smaller = build_model(tiny_denoiser(resolution=8), ModelCard("teacher"))
    with pytest.raises(UserError, match=r"image_shape was \[1, 16, 16\], is \[1, 8, 8\]"):
        prepare_pairs(smaller, "teacher", whole, **JOB)


def test_the_same_teacher_under_another_name_goes_on(teacher: Model, whole: Path, tmp_path: Path) -> None:
    """By its weights, wherever they lie; what an earlier version wrote has no weights to compare, but the name."""
    before = files_of(whole)
    prepare_pairs(teacher, "../elsewhere/teacher", whole, **JOB)
    assert files_of(whole) == before
    folder = prepare_pairs(teacher, "teacher", tmp_path, **JOB)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["job"]["network"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    prepare_pairs(teacher, "teacher", folder, **JOB)
    with pytest.raises(UserError, match="teacher was 'teacher', is 'other'"):
        prepare_pairs(teacher, "other", folder, **JOB)


def test_what_a_kill_left_half_written_is_removed(teacher: Model, whole: Path, tmp_path: Path) -> None:
    """Before the manifest had its name, and in the middle of a shard."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / f".{MANIFEST}.writing").write_text("{")
    prepare_pairs(teacher, "teacher", folder, **JOB)
    (folder / ".pairs_00001.safetensors.writing").write_bytes(b"half")
    prepare_pairs(teacher, "teacher", folder, **JOB)
    assert files_of(folder) == files_of(whole)


HOLDER = """
import sys, time
from pathlib import Path
from fewstep.formats.folder_lock import FolderLock
with FolderLock(Path(sys.argv[1]), "taken"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_dead(teacher: Model, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            UserError, match=r"another process writes pairs into .*; wait for it, or choose another folder"
        ):
            prepare_pairs(teacher, "teacher", tmp_path, **JOB)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        other.kill()
    prepare_pairs(teacher, "teacher", tmp_path, **JOB)
    prepare_pairs(teacher, "teacher", tmp_path, **JOB)  # the first of the two let go


def test_a_folder_of_other_things(teacher: Model, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no pairs; choose another folder"):
        prepare_pairs(teacher, "teacher", tmp_path, **JOB)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_manifest(teacher: Model, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=rf"{MANIFEST} is damaged"):
        prepare_pairs(teacher, "teacher", tmp_path, **JOB)


def test_impossible_guidance_makes_no_folder(tmp_path: Path) -> None:
    unguided = build_model(tiny_denoiser(), ModelCard("teacher"))
    with pytest.raises(UserError, match=r"guidance_scale=2\.0: this teacher was trained without label dropout"):
        prepare_pairs(unguided, "teacher", tmp_path / "new", num_pairs=2, guidance_scale=2.0)
    assert not (tmp_path / "new").exists()


def test_the_manifest_says_what_was_made(teacher: Model, whole: Path) -> None:
    manifest = json.loads((whole / MANIFEST).read_text())
    assert manifest["complete"]
    assert manifest["job"] == {
        "teacher": "teacher", "num_pairs": 10, "seed": 4, "num_steps": 2, "guidance_scale": 1.0, "shard_size": 4,
        "image_shape": [1, 16, 16], "precision": "float32", "network": teacher.fingerprint,
    }  # fmt: skip
    assert [entry["rows"] for entry in manifest["shards"]] == [4, 4, 2]
