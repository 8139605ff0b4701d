"""Stored latents are the VAE's own with the captions' embeddings, and an interrupted job ends in the same bytes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fewstep.data.captioned_images import CaptionedImages, open_captioned_images
from fewstep.data.latents import StoredLatents, StoredTexts, check_latents_fit
from fewstep.diffusion.draws import Draws
from fewstep.errors import UserError
from fewstep.families.registry import family_named
from fewstep.formats.fingerprints import text_fingerprint, vae_fingerprint
from fewstep.networks.autoencoder import Autoencoder, load_autoencoder
from fewstep.networks.text_encoders import TextEncoders
from fewstep.preparation import embeddings
from fewstep.preparation import latents as module
from fewstep.preparation.latents import import_lmdb_latents, prepare_latents
from tests.data.test_captioned_images import png, write_folder, write_tar
from tests.lmdb_files import write_lmdb
from tests.tiny_models import MAX_TOKENS, tiny_sd_folder

CAPTIONS = ["a cat", "a dog", "a cat", "red", "big cat", "a dog", "the end", "a cat", "one", "two"]
LONG = " ".join("cat" for _ in range(MAX_TOKENS))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd_folder(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="module")
def encoders(model: Path) -> TextEncoders:
    return family_named("sd").text_encoders(model)


@pytest.fixture(scope="module")
def vae(model: Path) -> Autoencoder:
    return load_autoencoder(model)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pictures", CAPTIONS)


@pytest.fixture
def job(vae: Autoencoder, encoders: TextEncoders, pictures: Path) -> dict[str, Any]:
    return {
        "autoencoder": vae, "encoders": encoders, "source": open_captioned_images(str(pictures)), "resolution": 16,
        "vae_fingerprint": "v", "shard_size": 4, "batch_size": 3,
    }  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def greys(*numbers: int) -> torch.Tensor:
    """The pictures of `write_folder` in [-1, 1]."""
    return (torch.tensor(numbers).float() / 127.5 - 1).reshape(-1, 1, 1, 1).expand(-1, 3, 16, 16)


@pytest.mark.slow
def test_the_mean_latents_and_the_captions(job: dict[str, Any], tmp_path: Path) -> None:
    progress: list[tuple[int, int | None]] = []
    prepare_latents(folder=tmp_path / "l", report=lambda done, total: progress.append((done, total)), **job)
    stored = StoredLatents(tmp_path / "l")
    assert (len(stored), stored.latent_shape, stored.captions.num_distinct) == (10, (4, 8, 8), 7)
    assert progress == sorted(progress)
    assert {(4, 10), (8, 10)} < set(progress)
    assert progress[-1] == (10, 10)
    index = torch.tensor([9, 0, 4])
    latents, text, *_ = stored.rows(index)
    expected = job["autoencoder"].encode(greys(*index.tolist()))
    torch.testing.assert_close(latents.float(), expected, atol=1e-3, rtol=1e-3)
    assert not torch.equal(latents[0], latents[1])  # the comparison can fail
    words = job["encoders"].encode([CAPTIONS[i] for i in index.tolist()])
    torch.testing.assert_close(text.float(), words.text, atol=2e-3, rtol=2e-3)
    assert stored.captions.prompts(torch.arange(10)) == CAPTIONS


def test_sampled_latents(job: dict[str, Any], tmp_path: Path) -> None:
    """Drawn per picture: batches and shards do not matter, the seed does."""
    folder = prepare_latents(folder=tmp_path / "l", noise_seed=5, **job)
    latents = StoredLatents(folder).rows(torch.arange(10))[0]
    expected = job["autoencoder"].encode(greys(*range(10)), Draws.of_batch(5, 0, 10))
    torch.testing.assert_close(latents.float(), expected, atol=1e-3, rtol=1e-3)
    other = prepare_latents(folder=tmp_path / "m", noise_seed=6, **job)
    assert not torch.allclose(latents, StoredLatents(other).rows(torch.arange(10))[0], atol=1e-2)


class Interrupted(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("finished", [0, 1, 2])
@pytest.mark.parametrize("at", ["write_tensors", "write_manifest"])
@pytest.mark.parametrize("streaming", [False, True])
def test_an_interrupted_job_ends_in_the_same_bytes(
    job: dict[str, Any], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int, at: str,
    streaming: bool,
) -> None:  # fmt: skip
    def source() -> CaptionedImages:
        return open_captioned_images(str(pictures), streaming=streaming)

    whole = prepare_latents(folder=tmp_path / "whole", **{**job, "source": source()}, noise_seed=1)
    folder, original, calls = tmp_path / "parts", getattr(module, at), []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == finished + 1:
            raise Interrupted
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, at, interrupted)
        with pytest.raises(Interrupted):
            prepare_latents(folder=folder, **{**job, "source": source()}, noise_seed=1)
        prepare_latents(folder=folder, **{**job, "source": source()}, noise_seed=1)
    assert len(calls) == 4  # what is done is not made again
    assert files_of(folder) == files_of(whole)


def test_a_source_whose_end_is_not_known(job: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    """Also one that ends with a full shard, and a finished job does nothing."""
    for size, shards in ((4, 3), (5, 2), (10, 1), (64, 1)):
        source = open_captioned_images(str(pictures), streaming=True)
        options = {**job, "source": source, "shard_size": size}
        folder = prepare_latents(folder=tmp_path / str(size), **options)
        stored = StoredLatents(folder)
        assert (len(stored), len(stored.manifest["shards"])) == (10, shards)
        before = files_of(folder)
        prepare_latents(folder=folder, **{**options, "autoencoder": _Untouchable(job["autoencoder"])})
        assert files_of(folder) == before


class _Untouchable:
    """An autoencoder that must not encode."""

    def __init__(self, vae: Autoencoder) -> None:
        self.factor = vae.factor


def test_the_first_pictures_only(job: dict[str, Any], tmp_path: Path) -> None:
    stored = StoredLatents(prepare_latents(folder=tmp_path / "l", num_images=6, **job))
    assert stored.captions.prompts(torch.arange(len(stored))) == CAPTIONS[:6]


def test_tars(job: dict[str, Any], tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", CAPTIONS)
    options = {**job, "source": open_captioned_images(str(path))}
    stored = StoredLatents(prepare_latents(folder=tmp_path / "l", **options))
    plain = StoredLatents(prepare_latents(folder=tmp_path / "m", **job))
    for ours, theirs in zip(stored.rows(torch.arange(10))[:2], plain.rows(torch.arange(10))[:2], strict=True):
        assert torch.equal(ours, theirs)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"a\.tar is cut short: it ends at byte 3000"):
        open_captioned_images(str(path))


def test_a_missing_caption_is_the_empty_prompt(job: dict[str, Any], tmp_path: Path) -> None:
    options = {**job, "source": open_captioned_images(str(write_folder(tmp_path / "more", ["a", "", "b", " "])))}
    stored = StoredLatents(prepare_latents(folder=tmp_path / "l", **options))
    assert stored.captions.prompts() == ["a", "", "b", ""]
    assert stored.captions.num_empty == 2
    text = stored.rows(torch.tensor([1]))[1].float()
    torch.testing.assert_close(text, job["encoders"].encode([""]).text, atol=2e-3, rtol=2e-3)


def test_captions_as_text_alone(job: dict[str, Any], tmp_path: Path) -> None:
    """The same latents and words, no embeddings; an earlier job of the other kind is another job."""
    words = StoredLatents(prepare_latents(folder=tmp_path / "words", captions="text", **job))
    whole = StoredLatents(prepare_latents(folder=tmp_path / "whole", **job))
    assert type(words.captions) is StoredTexts
    assert words.captions.prompts() == CAPTIONS
    index = torch.arange(len(CAPTIONS))
    assert torch.equal(words.latents(index), whole.rows(index)[0])
    with safe_open(tmp_path / "words/latents_00000.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"latents", "row", "prompt_bytes", "prompt_ends"}
    with pytest.raises(UserError, match=r"holds other latents: captions was 'text', is None"):
        prepare_latents(folder=tmp_path / "words", **job)


def test_the_size_is_said_first(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of latents and, at most, embeddings; what does not fit is refused with the option that spares it."""
    empty = job["encoders"].encode_empty().text
    latents, captions = 10 * 2 * 4 * 8 * 8 / 1e9, 10 * 2 * empty.numel() / 1e9
    free = 1.5 * (latents + captions)
    monkeypatch.setattr(embeddings, "_WORTH_SAYING", 0.0)
    monkeypatch.setattr(embeddings.shutil, "disk_usage", lambda path: SimpleNamespace(free=round(free * 1e9)))
    with pytest.raises(UserError) as error:
        prepare_latents(folder=tmp_path / "l", **job)
    assert str(error.value).startswith(
        f"{tmp_path / 'l'}: latents of 10 pictures and their captions' embeddings (up to {captions:,.3g} GB) would take "
        f"{latents + captions:,.3g} GB, and the disk has {free:,.3g} GB free, of which half may be filled; --captions text "
    )
    assert not (tmp_path / "l").exists()
    prepare_latents(folder=tmp_path / "m", captions="text", **job)
    assert f"latents of 10 pictures will take {latents:,.3g} GB" in capsys.readouterr().err
    monkeypatch.setattr(embeddings.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    streamed = {**job, "source": open_captioned_images(str(write_tar(tmp_path / "a.tar", CAPTIONS)))}
    prepare_latents(folder=tmp_path / "n", captions="text", **streamed)
    assert f"latents of every 1,000 pictures will take {100 * latents:,.3g} GB" in capsys.readouterr().err


def test_long_captions(job: dict[str, Any], tmp_path: Path) -> None:
    captions = ["a", "b", LONG]
    told = "the caption of {path}/002.png (row 2) has 18 tokens, the text encoder takes 16 ("
    path = write_folder(tmp_path / "more", captions)
    options = {**job, "source": open_captioned_images(str(path))}
    with pytest.raises(UserError) as error:
        prepare_latents(folder=tmp_path / "l", **options)
    assert told.format(path=path) in str(error.value)
    stored = StoredLatents(prepare_latents(folder=tmp_path / "m", skip_bad=True, **options))
    assert len(stored) == 2
    assert stored.manifest["shards"][0]["source_rows"] == 3
    assert len(StoredLatents(prepare_latents(folder=tmp_path / "n", truncate=True, **options))) == 3


def test_bad_pictures(job: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    """A whole shard of them leaves the shard empty and the others as they are."""
    for number in range(4, 8):
        (pictures / f"{number:03d}.png").write_bytes(b"no picture")
    options = {**job, "source": open_captioned_images(str(pictures))}
    with pytest.raises(UserError, match=r"picture .*004\.png \(row 4\) does not decode"):
        prepare_latents(folder=tmp_path / "l", **options)
    stored = StoredLatents(prepare_latents(folder=tmp_path / "m", skip_bad=True, noise_seed=2, **options))
    assert [entry["rows"] for entry in stored.manifest["shards"]] == [4, 0, 2]
    assert stored.captions.prompts(torch.arange(6)) == [*CAPTIONS[:4], *CAPTIONS[8:]]
    expected = job["autoencoder"].encode(greys(8, 9), Draws(2, 0, torch.tensor([8, 9])))
    torch.testing.assert_close(stored.rows(torch.tensor([4, 5]))[0].float(), expected, atol=1e-3, rtol=1e-3)


def test_captions_that_cannot_be_used_are_left_out_too(job: dict[str, Any], tmp_path: Path) -> None:
    """With --skip-bad, of text files and of tables; without it the first one is named."""
    beside, rows = tmp_path / "beside", write_folder(tmp_path / "rows", ["a", "b", "c"])
    beside.mkdir()
    for number, caption in enumerate([b"a", b"caf\xe9", b"c"]):
        (beside / f"{number}.png").write_bytes(png(number))
        (beside / f"{number}.txt").write_bytes(caption)
    metadata = (rows / "metadata.jsonl").read_text()
    (rows / "metadata.jsonl").write_text(metadata.replace('"b"', "3"))
    for source, told in ((beside, "1.txt cannot be read as UTF-8 text"), (rows, "the caption is int, not text")):
        options = {**job, "source": open_captioned_images(str(source))}
        with pytest.raises(UserError, match=told):
            prepare_latents(folder=tmp_path / f"l-{source.name}", **options)
        stored = StoredLatents(prepare_latents(folder=tmp_path / f"m-{source.name}", skip_bad=True, **options))
        assert stored.captions.prompts() == ["a", "c"]


def test_nothing_usable(job: dict[str, Any], tmp_path: Path) -> None:
    options = {**job, "source": open_captioned_images(str(write_folder(tmp_path / "small", ["a", "b"], size=8)))}
    with pytest.raises(UserError, match="would have to be enlarged"):
        prepare_latents(folder=tmp_path / "l", **options)
    with pytest.raises(UserError, match="small has no usable picture with a caption"):
        prepare_latents(folder=tmp_path / "m", skip_bad=True, **options)


def test_a_resolution_that_does_not_fit(job: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--resolution 15 is no multiple of the VAE's factor 2"):
        prepare_latents(folder=tmp_path / "l", **{**job, "resolution": 15})
    assert not (tmp_path / "l").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"noise_seed": 1}, "noise_seed was None, is 1"), ({"vae_fingerprint": "w"}, "vae was 'v', is 'w'"),
        ({"resolution": 8}, "resolution was 16, is 8"), ({"fit": "exact"}, "fit was 'crop', is 'exact'"),
        ({"num_images": 5}, "num_images was None, is 5"), ({"skip_bad": True}, "skip_bad was False, is True"),
    ],
)  # fmt: skip
def test_another_job_is_refused(job: dict[str, Any], tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    prepare_latents(folder=tmp_path / "l", **job)
    with pytest.raises(UserError) as error:
        prepare_latents(folder=tmp_path / "l", **{**job, **changes})
    assert str(error.value) == f"{tmp_path / 'l'} holds other latents: {told}; choose another folder"


def test_published_latents(encoders: TextEncoders, model: Path, tmp_path: Path) -> None:
    values = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    write_lmdb(tmp_path / "set", {"latents": values, "prompts": CAPTIONS})
    facts = {"vae_fingerprint": vae_fingerprint(model)}
    folder = import_lmdb_latents(encoders, tmp_path / "set", tmp_path / "l", channels=4, shard_size=4, **facts)
    stored = StoredLatents(folder)
    assert torch.equal(stored.rows(torch.arange(10))[0], values)
    assert stored.captions.prompts(torch.arange(10)) == CAPTIONS
    check_latents_fit(stored, text_fingerprint=text_fingerprint(model), latent_shape=(4, 8, 8), **facts)
    (tmp_path / "set").rename(tmp_path / "moved")
    assert import_lmdb_latents(encoders, tmp_path / "moved", folder, channels=4, shard_size=4, **facts) == folder
    scaled = import_lmdb_latents(encoders, tmp_path / "moved", tmp_path / "m", channels=4, scale=0.5, **facts)
    assert torch.equal(StoredLatents(scaled).rows(torch.arange(10))[0], (values.float() * 0.5).half())


def test_published_latents_that_cannot_be_used(encoders: TextEncoders, tmp_path: Path) -> None:
    def refused(**options: Any) -> str:
        with pytest.raises(UserError) as error:
            import_lmdb_latents(
                encoders, tmp_path / "set", tmp_path / f"l{len(options)}", channels=4, vae_fingerprint="v", **options
            )
        return str(error.value)

    values = torch.randn(3, 4, 8, 8).half()
    assert "holds no LMDB" in refused()
    write_lmdb(tmp_path / "set", {"latents": values * 6, "prompts": ["a", "b", "c"]})
    assert "its latents have a standard deviation of " in refused()
    assert "give --lmdb-scale" in refused()
    write_lmdb(tmp_path / "set", {"latents": values, "prompts": ["a", "b"]})
    assert "latents of shape (3, 4, 8, 8) and 2 prompts do not belong together" in refused()
    write_lmdb(tmp_path / "set", {"latents": values[:, 0], "prompts": ["a", "b", "c"]})
    assert "do not belong together" in refused()
    write_lmdb(tmp_path / "set", {"latents": values, "prompts": ["a", LONG, "c"]})
    assert "prompts_1_data has 18 tokens" in refused()
    import_lmdb_latents(encoders, tmp_path / "set", tmp_path / "m", channels=4, vae_fingerprint="v", truncate=True)
    values[0, 0, 0, 0] = float("inf")
    write_lmdb(tmp_path / "set", {"latents": values, "prompts": ["a", "b", "c"]})
    assert "standard deviation of nan" in refused()
    assert "a latent is not finite as float16" in refused(scale=1.0)


@pytest.mark.slow
def test_a_new_sample_of_the_distribution_each_pass(job: dict[str, Any], tmp_path: Path) -> None:
    """Real latents are samples of the VAE's posterior; a resumed run draws the same ones, another pass others."""
    means = StoredLatents(prepare_latents(folder=tmp_path / "mean", **job))
    stored = StoredLatents(prepare_latents(folder=tmp_path / "spread", keep_spread=True, **job))
    everything = torch.arange(len(stored))
    assert torch.equal(stored.latents(everything), means.latents(everything))
    draws = [Draws(0, step, everything + len(stored) * step) for step in range(400)]
    samples = torch.stack([stored.drawn(everything, one) for one in draws])
    assert torch.equal(samples[0], stored.drawn(everything, draws[0]))
    assert not torch.equal(samples[0], samples[1])
    mean, spread = job["autoencoder"].distribution(greys(0))
    torch.testing.assert_close(samples[:, 0].mean(0), mean[0], atol=0.2 * float(spread.max()) + 2e-3, rtol=0)
    torch.testing.assert_close(samples[:, 0].std(0), spread[0], rtol=0.25, atol=1e-3)
    assert torch.equal(means.drawn(everything, draws[0]), means.latents(everything).float())  # nothing to draw from


def test_a_changed_deviation_is_noticed(job: dict[str, Any], tmp_path: Path) -> None:
    folder = prepare_latents(folder=tmp_path / "spread", keep_spread=True, **job)
    with pytest.raises(UserError, match="spread was True, is None"):
        prepare_latents(folder=folder, **job)


def test_the_same_pictures_elsewhere_go_on_and_others_are_noticed(job: dict[str, Any], tmp_path: Path) -> None:
    """By what lies in the folder, not by how it is called; what is not yet stored may still be mended."""
    source = write_folder(tmp_path / "here", CAPTIONS[:6])

    def again(source: Path, folder: str = "out") -> Path:
        return prepare_latents(folder=tmp_path / folder, **{**job, "source": open_captioned_images(str(source))})

    (source / "005.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"005\.png .* does not decode"):
        again(source)
    source = source.rename(tmp_path / "there")
    (source / "005.png").write_bytes(png(5, size=32))
    again(source)
    (source / "001.png").write_bytes(png(1, size=32))
    with pytest.raises(
        UserError, match=r"out: pictures or captions among those of rows 0 to 3 of .*there were changed after"
    ):
        again(source)
    (source / "006.png").write_bytes(png(6))
    with (source / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "006.png", "text": "new"}\n')
    with pytest.raises(UserError, match=r"out holds other latents: images was .*'6 pictures, .*'7 pictures, "):
        again(source)
    tar = write_tar(tmp_path / "a.tar", ["a", "b"])
    again(tar, "tars")
    tar = tar.rename(tmp_path / "b.tar")
    again(tar, "tars")
    write_tar(tar, ["a", "b", "c"])
    with pytest.raises(UserError, match=r"tars holds other latents: images was .*'1 files, "):
        again(tar, "tars")
