"""`fewstep prepare embeddings` and `prepare latents` as a user types them."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.data.latents import StoredEmbeddings, StoredLatents, check_embeddings_fit, check_latents_fit
from fewstep.data.noise_image_pairs import NoiseImagePairs
from fewstep.errors import UserError
from fewstep.formats.fingerprints import network_fingerprint, text_fingerprint, vae_fingerprint
from fewstep.formats.lmdb import ODE_PAIRS, LmdbArrays
from fewstep.training.run import train
from tests.data.test_captioned_images import write_folder
from tests.formats.test_lmdb import change
from tests.lmdb_files import write_lmdb
from tests.tiny_models import tiny_sdxl_folder
from tests.training.helpers import tiny_train_settings


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl_folder(tmp_path_factory.mktemp("models") / "sdxl")


def run(*words: object) -> str:
    result = CliRunner().invoke(app, ["prepare", *map(str, words), "--device", "cpu"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: object) -> str:
    with pytest.raises(UserError) as error:
        run(*words)
    return str(error.value)


def test_embeddings(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cat\n")
    output = run("embeddings", teacher, tmp_path / "prompts.txt", tmp_path / "e", "--shard-size", 2)
    assert f"{tmp_path / 'e'}: 3 prompts, 2 distinct" in output
    stored = StoredEmbeddings(tmp_path / "e")
    check_embeddings_fit(stored, text_fingerprint=text_fingerprint(teacher))
    assert stored.rows(torch.tensor([2]))[0].shape == (1, 16, 64)


@pytest.mark.slow
def test_latents(teacher: Path, tmp_path: Path) -> None:
    """The size is the teacher's own unless it is given."""
    pictures = write_folder(tmp_path / "pictures", ["a cat", "", "a dog"], size=20)
    with pytest.raises(UserError, match=r"--captions words: choose embeddings or text"):
        run("latents", teacher, tmp_path / "l", "--images", pictures, "--captions", "words")
    (pictures / "000.png").write_bytes(b"no picture")
    output = run("latents", teacher, tmp_path / "m", "--images", pictures, "--skip-bad", "--noise-seed", 1)
    told = "2 distinct captions (1 missing, which count as the empty prompt), 1 pictures skipped"
    assert f"{tmp_path / 'm'}: 2 latents of shape 4x8x8, {told}" in output
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


def test_latents_that_the_network_cannot_use(teacher: Path, tmp_path: Path) -> None:
    """Each was prepared whole, and refused when training read it."""
    other = Path(shutil.copytree(teacher, tmp_path / "other"))
    shutil.rmtree(other / "vae")
    config = {**json.loads((teacher / "vae/config.json").read_text()), "latent_channels": 8}
    AutoencoderKL.from_config(config).save_pretrained(other / "vae")
    pictures = write_folder(tmp_path / "pictures", ["a cat"], size=16)
    told = refused("latents", other, tmp_path / "l", "--images", pictures)
    assert told.endswith("its vae has latents of 8 channels, its unet of 4; one of the two is another model's")
    write_lmdb(tmp_path / "set", {"latents": torch.randn(2, 8, 8, 8).half(), "prompts": ["a", "b"]})
    told = refused("latents", teacher, tmp_path / "l", "--from-lmdb", tmp_path / "set")
    assert told == f"{tmp_path / 'set'} holds latents of 8 channels, this model's have 4"
    assert not (tmp_path / "l").exists()


def pairs_lmdb(folder: Path, **changes: torch.Tensor) -> Path:
    """Five ODE pairs of the tiny SDXL in the published layout, embeddings as batches of one."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "latents": (5, 4, 8, 8), "images": (5, 4, 8, 8), "prompt_embeds_list": (5, 1, 16, 64),
        "pooled_prompt_embeds": (5, 1, 24),
    }  # fmt: skip
    arrays = {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}
    write_lmdb(folder, arrays | changes)
    return folder


def test_pairs_that_the_network_cannot_use(teacher: Path, tmp_path: Path) -> None:
    lmdb = pairs_lmdb(tmp_path / "set", **{name: torch.randn(5, 8, 8, 8).half() for name in ("latents", "images")})
    told = refused("pairs", teacher, tmp_path / "p", "--from-lmdb", lmdb)
    assert told == f"{lmdb} holds latents of 8 channels, this model's have 4"
    assert not (tmp_path / "p").exists()


@pytest.mark.slow
def test_published_pairs(teacher: Path, tmp_path: Path) -> None:
    """What comes out is what a warm-up reads: noise, latents, and each pair's own embedding."""
    lmdb = pairs_lmdb(tmp_path / "set")
    run("pairs", teacher, tmp_path / "p", "--from-lmdb", lmdb)
    arrays = LmdbArrays(lmdb, ODE_PAIRS)
    pairs = NoiseImagePairs(tmp_path / "p")
    assert torch.equal(pairs.noise, arrays.rows("latents", range(5)))
    assert torch.equal(pairs.images, arrays.rows("images", range(5)))
    assert pairs.labels.tolist() == list(range(5))
    stored = StoredEmbeddings(tmp_path / "p/embeddings")
    check_embeddings_fit(stored, text_fingerprint=text_fingerprint(teacher))
    text, pooled, _ = stored.rows(torch.tensor([3, 0]))
    assert torch.equal(text, arrays.rows("prompt_embeds_list", [3, 0])[:, 0])
    assert pooled is not None
    assert torch.equal(pooled, arrays.rows("pooled_prompt_embeds", [3, 0])[:, 0])
    assert stored.prompts(torch.tensor([3])) == ["pair 3 of set"]
    assert pairs.manifest["job"]["network"] == network_fingerprint(teacher)
    run("pairs", teacher, tmp_path / "some", "--from-lmdb", lmdb, "--num-pairs", 2, "--lmdb-scale", 0.5)
    some = NoiseImagePairs(tmp_path / "some")
    assert len(some) == len(StoredEmbeddings(tmp_path / "some/embeddings")) == 2
    torch.testing.assert_close(some.images, pairs.images[:2] * 0.5)
    regression = {
        "distribution_matching_weight": 0.0, "gan_generator_weight": 0.0, "gan_discriminator_weight": 0.0,
        "regression_weight": 1.0,
    }  # fmt: skip
    train(tiny_train_settings(
        teacher, tmp_path, tmp_path / "warm", losses=regression, generator={"step_indices": [399], "ema_half_life_images": 0},
        data={"images": "", "pairs": str(tmp_path / "p")}, training={"num_steps": 2, "batch_size": 2},
    ))  # fmt: skip
    assert (tmp_path / "warm/generator/fewstep.json").is_file()


@pytest.mark.slow
def test_published_pairs_that_cannot_be_used(teacher: Path, tmp_path: Path) -> None:
    def refused(**changes: torch.Tensor) -> str:
        with pytest.raises(UserError) as error:
            run("pairs", teacher, tmp_path / "p", "--from-lmdb", pairs_lmdb(tmp_path / "set", **changes))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "p/manifest.json").exists()
        return str(error.value)

    unit = torch.randn(5, 4, 8, 8).half()
    assert "its latents have a standard deviation of" in refused(latents=unit * 14)
    assert "give --lmdb-scale" in refused(images=unit * 7)
    assert "are no pairs of noise and latent" in refused(images=torch.zeros(5, 3, 64, 64).half())
    assert "need rows of shape (16, 64); give the teacher that made them" in refused(
        prompt_embeds_list=torch.zeros(5, 16, 32).half()
    )
    assert "pooled_prompt_embeds has shape (4, 24)" in refused(pooled_prompt_embeds=torch.zeros(4, 24).half())
    lmdb = pairs_lmdb(tmp_path / "set")
    change(lmdb, "images_3_data", None)
    with pytest.raises(UserError, match="images_3_data is missing of 5 rows; the data set is incomplete or damaged"):
        run("pairs", teacher, tmp_path / "p", "--from-lmdb", lmdb)
    lmdb = pairs_lmdb(tmp_path / "set")
    with (lmdb / "data.mdb").open("r+b") as file:
        file.truncate((lmdb / "data.mdb").stat().st_size // 2)
    with pytest.raises(UserError, match="is cut short"):
        run("pairs", teacher, tmp_path / "p", "--from-lmdb", lmdb)
    with pytest.raises(UserError, match="brings its own prompts and samples"):
        run("pairs", teacher, tmp_path / "p", "--from-lmdb", lmdb, "--prompts", "prompts.txt")
    with pytest.raises(UserError, match="--from-lmdb samples nothing: leave out --seed, --guidance-scale"):
        run("pairs", teacher, tmp_path / "p", "--from-lmdb", lmdb, "--guidance-scale", 8)
    with pytest.raises(UserError, match="--lmdb-scale 2 is of --from-lmdb"):
        run("pairs", teacher, tmp_path / "p", "--lmdb-scale", 2)


def test_one_source_must_be_named(teacher: Path, tmp_path: Path) -> None:
    for words in ([], ["--images", tmp_path, "--from-lmdb", tmp_path]):
        with pytest.raises(UserError, match="--images SOURCE or --from-lmdb PATH: give one of them"):
            run("latents", teacher, tmp_path / "l", *words)
    with pytest.raises(UserError, match="--fit stretch: choose crop, pad or exact"):
        run("latents", teacher, tmp_path / "l", "--images", tmp_path, "--fit", "stretch")


def test_options_that_an_lmdb_would_not_read_are_refused(tmp_path: Path) -> None:
    told = refused("latents", "bundled:emoji-sd", tmp_path / "l", "--from-lmdb", tmp_path, "--num-images", 3)
    assert told == "--from-lmdb takes all of its latents as they are: leave out --num-images"
    told = refused("latents", "bundled:emoji-sd", tmp_path / "l", "--images", tmp_path, "--lmdb-scale", 2)
    assert "--lmdb-scale 2 is of --from-lmdb" in told


def test_the_background_is_a_setting(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for number in range(2):
        Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / f"p/{number}.png")
    common = ["--features", "bundled:fashion-mnist", "--resolution", 28, "--channels", 1, "--fit", "pad"]
    means = []
    for colour in ("white", "black"):
        run("statistics", tmp_path / "p", tmp_path / "s.npz", *common, "--background", colour)
        means.append(np.load(tmp_path / "s.npz")["mu"])
    assert abs(means[0] - means[1]).max() > 1e-3
    told = refused("statistics", tmp_path / "p", tmp_path / "s.npz", *common, "--background", "whitish")
    assert "data.background='whitish' is not a colour" in told


def test_a_device_is_no_folder(tmp_path: Path) -> None:
    os.symlink("/dev/null", tmp_path / "out")
    told = refused("pairs", "bundled:fashion-mnist", tmp_path / "out", "--num-pairs", 1, "--teacher-steps", 1)
    assert told == f"{tmp_path / 'out'} is a file; choose a folder for the pairs"
