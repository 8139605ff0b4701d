"""Stored embeddings and latents: rows come from disk, damage is noticed, another teacher's are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.data import latents as latents_module
from fewstep.data.latents import (
    EMBEDDINGS,
    LATENTS,
    StoredEmbeddings,
    StoredLatents,
    check_embeddings_fit,
    check_latents_fit,
    pack_texts,
    read_texts,
)
from fewstep.data.shard_folder import MANIFEST, ShardKind, write_manifest, write_tensors
from fewstep.data.stored_rows import StoredRows, map_tensor
from fewstep.errors import UserError

ROWS = [[0, 1, 0], [1, 1, 1, 0], [2, 0]]  # the second shard brings no new text
TEXTS = [["a cat", "ein Hündchen"], [], ["🐈\n"]]
POSITIONS = [row for shard in ROWS for row in shard]


def numbered(count: int, *shape: int, first: int = 0) -> Tensor:
    """Rows that hold their own number."""
    return (torch.arange(count) + first).reshape(-1, *[1] * len(shape)).expand(-1, *shape).half().contiguous()


def write_folder(folder: Path, kind: ShardKind, pooled: bool = True, complete: bool = True, **job: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    entries, texts, rows = [], 0, 0
    for number, (row, new) in enumerate(zip(ROWS, TEXTS, strict=True)):
        tensors = {"row": torch.tensor(row), "text": numbered(len(new), 3, 4, first=texts), **pack_texts(new)}
        if pooled:
            tensors["pooled"] = numbered(len(new), 5, first=10 + texts)
        if number == 0:
            tensors["empty_text"] = torch.full((1, 3, 4), -1.0).half()
            tensors |= {"empty_pooled": torch.full((1, 5), -2.0).half()} if pooled else {}
        if kind is LATENTS:
            tensors["latents"] = numbered(len(row), 4, 8, 8, first=100 + rows)
        entries.append(write_tensors(folder, number, tensors, len(row), kind))
        texts, rows = texts + len(new), rows + len(row)
    job = {"text_encoders": "t" * 64, "vae": "v" * 64, **job}
    write_manifest(folder, {"job": job, "shards": entries, "complete": complete})
    return folder


@pytest.mark.parametrize("pooled", [True, False])
def test_embeddings_by_place_in_the_list(tmp_path: Path, pooled: bool) -> None:
    stored = StoredEmbeddings(write_folder(tmp_path, EMBEDDINGS, pooled))
    assert (len(stored), stored.num_distinct, stored.text_fingerprint) == (9, 3, "t" * 64)
    index = torch.tensor([8, 0, 7, 1, 7])
    text, pool, lengths = stored.rows(index)
    assert lengths is None
    expected = torch.tensor([POSITIONS[i] for i in index.tolist()])
    assert (text.dtype, text.shape) == (torch.float16, (5, 3, 4))
    assert torch.equal(text, expected.half().reshape(-1, 1, 1).expand(-1, 3, 4))
    assert stored.prompts(index) == [["a cat", "ein Hündchen", "🐈\n"][row] for row in expected.tolist()]
    assert torch.equal(stored.empty[0], torch.full((1, 3, 4), -1.0).half())
    if pooled:
        assert pool is not None
        assert stored.empty[1] is not None
        assert torch.equal(pool, (10 + expected).half().reshape(-1, 1).expand(-1, 5))
        assert torch.equal(stored.empty[1], torch.full((1, 5), -2.0).half())
    else:
        assert pool is None
        assert stored.empty[1] is None


def test_latents_with_their_captions(tmp_path: Path) -> None:
    stored = StoredLatents(write_folder(tmp_path, LATENTS))
    assert (len(stored), stored.latent_shape, stored.vae_fingerprint) == (9, (4, 8, 8), "v" * 64)
    index = torch.randperm(9)
    latents, text, pooled, _ = stored.rows(index)
    assert torch.equal(latents[:, 0, 0, 0].long() - 100, index)
    assert text[:, 0, 0].long().tolist() == [POSITIONS[i] for i in index.tolist()]
    assert pooled is not None
    assert latents.is_contiguous()
    latents += 1  # rows are copies: the files are as they were
    assert torch.equal(StoredLatents(tmp_path).rows(index)[0] + 1, latents)


@pytest.mark.parametrize("index", [[9], [-1], [0, 100]])
def test_rows_that_are_not_there(tmp_path: Path, index: list[int]) -> None:
    stored = StoredLatents(write_folder(tmp_path, LATENTS))
    with pytest.raises(IndexError):
        stored.rows(torch.tensor(index))


def test_rows_are_not_loaded_before_they_are_asked_for(tmp_path: Path) -> None:
    stored = StoredLatents(write_folder(tmp_path, LATENTS))
    assert all(isinstance(part, np.memmap) for part in stored._latents._parts)
    assert stored.rows(torch.tensor([], dtype=torch.int64))[0].shape == (0, 4, 8, 8)


def refused(folder: Path, opened: Any = StoredLatents) -> str:
    with pytest.raises(UserError) as error:
        opened(folder)
    return str(error.value)


ADVICE = "run the same `fewstep prepare latents` command again, which remakes it"


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("shard", [0, 2])
def test_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int, checksums: bool) -> None:
    """A folder too large for checksums still shows files that are missing or cut short."""
    if not checksums:
        monkeypatch.setattr(latents_module, "_HASH_LIMIT_BYTES", 0)
    write_folder(tmp_path, LATENTS)
    path = tmp_path / f"latents_{shard:05d}.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert str(path) in refused(tmp_path)
    assert ADVICE in refused(tmp_path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if checksums:
        assert f"{path} is not the file that was written (checksum differs); {ADVICE}" == refused(tmp_path)
    path.unlink()
    assert f"{path} cannot be read ([Errno 2] No such file" in refused(tmp_path)
    assert ADVICE in refused(tmp_path)


def test_folders_that_are_not_finished_or_of_another_kind(tmp_path: Path) -> None:
    assert refused(tmp_path) == f"{tmp_path} holds no latents; make them with `fewstep prepare latents`"
    told = f"{tmp_path} holds no text embeddings; make them with `fewstep prepare embeddings`"
    assert refused(tmp_path, StoredEmbeddings) == told
    write_folder(tmp_path / "a", LATENTS, complete=False)
    assert "is unfinished: run the same `fewstep prepare latents` command again" in refused(tmp_path / "a")
    write_folder(tmp_path / "b", EMBEDDINGS)
    assert "cannot be read ('latents')" in refused(tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / MANIFEST).write_text(json.dumps({"shards": [{}], "complete": True}))
    assert "is damaged: " in refused(tmp_path / "c")


def test_rows_that_point_at_no_text(tmp_path: Path) -> None:
    tensors = {
        "row": torch.tensor([0, 3]),
        "text": numbered(1, 3, 4),
        "empty_text": numbered(1, 3, 4),
        **pack_texts(["a"]),
    }
    write_manifest(
        tmp_path, {"job": {}, "shards": [write_tensors(tmp_path, 0, tensors, 2, EMBEDDINGS)], "complete": True}
    )
    assert "rows point at no text" in refused(tmp_path, StoredEmbeddings)


def test_another_teacher(tmp_path: Path) -> None:
    stored = StoredLatents(write_folder(tmp_path, LATENTS))
    same: dict[str, Any] = {
        "vae_fingerprint": "v" * 64, "text_fingerprint": "t" * 64, "latent_shape": torch.Size((4, 8, 8)),
    }  # fmt: skip
    check_latents_fit(stored, **same)
    other_vae = f"{tmp_path} holds latents of another VAE or resolution than the teacher's"
    for change, told in (
        ({"latent_shape": (4, 16, 16)}, f"{other_vae}: their shape is (4, 8, 8), the teacher's (4, 16, 16); prepare"),
        ({"latent_shape": (16, 8, 8)}, other_vae),
        ({"vae_fingerprint": "w" * 64}, f"{other_vae} (VAE vvvvvvvvvvvv against wwwwwwwwwwww); prepare"),
        (
            {"text_fingerprint": "u" * 64},
            "holds embeddings of another encoder than the teacher's (tttttttttttt against",
        ),
    ):
        with pytest.raises(UserError) as error:
            check_latents_fit(stored, **{**same, **change})
        assert told in str(error.value)
    embeddings = StoredEmbeddings(write_folder(tmp_path / "e", EMBEDDINGS))
    check_embeddings_fit(embeddings, text_fingerprint="t" * 64)
    with pytest.raises(UserError, match="embeddings of another encoder"):
        check_embeddings_fit(embeddings, text_fingerprint="u" * 64)


def test_texts_round_trip(tmp_path: Path) -> None:
    for texts in ([], [""], ["a", "", "größer 🐈\n", "b"]):
        save_file(pack_texts(texts), tmp_path / "a.safetensors")
        assert read_texts(tmp_path / "a.safetensors") == texts
    (tmp_path / "a.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="cannot be read"):
        read_texts(tmp_path / "a.safetensors")


def test_stored_rows_of_different_shape(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows of different shapes"):
        StoredRows([np.zeros((2, 3)), np.zeros((2, 4))])
    with pytest.raises(ValueError, match="rows of different shapes"):
        StoredRows([])
    (tmp_path / "a").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="no safetensors file"):
        map_tensor(tmp_path / "a", "x")
