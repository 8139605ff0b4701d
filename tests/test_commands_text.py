"""`fewstep prepare embeddings` and `prepare latents` as a user types them."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fewstep.cli import app
from fewstep.data.latents import StoredEmbeddings, StoredLatents, check_embeddings_fit, check_latents_fit
from fewstep.errors import UserError
from fewstep.formats.fingerprints import text_fingerprint, vae_fingerprint
from fewstep.formats.lmdb import write_lmdb
from tests.data.test_captioned_images import write_folder
from tests.tiny_models import tiny_sdxl_folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl_folder(tmp_path_factory.mktemp("models") / "sdxl")


def run(*words: object) -> str:
    result = CliRunner().invoke(app, ["prepare", *map(str, words), "--device", "cpu"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_embeddings(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cat\n")
    output = run("embeddings", teacher, tmp_path / "prompts.txt", tmp_path / "e", "--shard-size", 2)
    assert f"{tmp_path / 'e'}: 3 prompts, 2 distinct" in output
    assert "2 of 3 prompts" in output
    stored = StoredEmbeddings(tmp_path / "e")
    check_embeddings_fit(stored, text_fingerprint=text_fingerprint(teacher))
    assert stored.rows(torch.tensor([2]))[0].shape == (1, 16, 64)


def test_latents(teacher: Path, tmp_path: Path) -> None:
    """The size is the teacher's own unless it is given."""
    pictures = write_folder(tmp_path / "pictures", ["a cat", "", "a dog"], size=20)
    with pytest.raises(UserError, match=r"001\.png \(row 1\) is empty"):
        run("latents", teacher, tmp_path / "l", "--images", pictures)
    output = run("latents", teacher, tmp_path / "m", "--images", pictures, "--skip-bad", "--noise-seed", 1)
    assert f"{tmp_path / 'm'}: 2 latents of shape 4x8x8, 2 distinct captions, 1 pictures skipped" in output
    check_latents_fit(
        StoredLatents(tmp_path / "m"), vae_fingerprint=vae_fingerprint(teacher),
        text_fingerprint=text_fingerprint(teacher), latent_shape=(4, 8, 8),
    )  # fmt: skip
    output = run("latents", teacher, tmp_path / "n", "--images", pictures, "--skip-bad", "--resolution", 12)
    assert "latents of shape 4x6x6" in output


def test_published_latents(teacher: Path, tmp_path: Path) -> None:
    write_lmdb(tmp_path / "set", {"latents": torch.randn(3, 4, 8, 8).half(), "prompts": ["a", "b", "a"]})
    output = run("latents", teacher, tmp_path / "l", "--from-lmdb", tmp_path / "set")
    assert "3 latents of shape 4x8x8, 2 distinct captions, 0 pictures skipped" in output


def test_one_source_must_be_named(teacher: Path, tmp_path: Path) -> None:
    for words in ([], ["--images", tmp_path, "--from-lmdb", tmp_path]):
        with pytest.raises(UserError, match="--images SOURCE or --from-lmdb PATH: give one of them"):
            run("latents", teacher, tmp_path / "l", *words)
    with pytest.raises(UserError, match="--fit stretch: choose crop, pad or exact"):
        run("latents", teacher, tmp_path / "l", "--images", tmp_path, "--fit", "stretch")
