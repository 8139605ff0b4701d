"""Stored embeddings are the text encoders' own, and an interrupted job ends in the same bytes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewstep.data.latents import StoredEmbeddings
from fewstep.data.shard_folder import MANIFEST
from fewstep.errors import UserError
from fewstep.families.registry import family_named
from fewstep.networks.text_encoders import TextEmbeddings, TextEncoders
from fewstep.preparation import embeddings as module
from fewstep.preparation import shards
from fewstep.preparation.embeddings import announce_size, prepare_embeddings
from tests.tiny_models import MAX_TOKENS, tiny_sd_folder, tiny_sdxl_folder

PROMPTS = ["a cat", "a dog", "a cat", "red", "big cat", "a dog", "the end", "a cat", "one", "two"]
JOB: dict[str, Any] = {"shard_size": 4, "batch_size": 2}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def encoders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextEncoders:
    make = {"sd": tiny_sd_folder, "sdxl": tiny_sdxl_folder}[request.param]
    folder = make(tmp_path_factory.mktemp("models") / request.param)
    return family_named(request.param).text_encoders(folder)


@pytest.fixture
def whole(encoders: TextEncoders, tmp_path: Path) -> Path:
    """A job nobody interrupted: shards of 4, 4 and 2 prompts."""
    return prepare_embeddings(encoders, PROMPTS, tmp_path / "whole", **JOB)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_are_the_encoders_own(encoders: TextEncoders, whole: Path) -> None:
    stored = StoredEmbeddings(whole)
    index = torch.tensor([9, 0, 4, 7])
    text, pooled, _ = stored.rows(index)
    expected = encoders.encode([PROMPTS[i] for i in index.tolist()])
    torch.testing.assert_close(text.float(), expected.text, atol=2e-3, rtol=2e-3)
    assert (text[0] - text[1]).abs().mean() > 0.01  # the comparison can fail
    if expected.pooled is None:
        assert pooled is None
    else:
        assert pooled is not None
        torch.testing.assert_close(pooled.float(), expected.pooled, atol=2e-3, rtol=2e-3)
    empty = encoders.encode_empty()
    torch.testing.assert_close(stored.empty[0].float(), empty.text, atol=2e-3, rtol=2e-3)
    assert (stored.empty[1] is None) == (empty.pooled is None)
    assert stored.prompts(torch.arange(10)) == PROMPTS


def test_distinct_prompts_are_encoded_once(
    encoders: TextEncoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    original = TextEncoders.encode

    def counted(self: TextEncoders, prompts: list[str]) -> TextEmbeddings:
        seen.extend(prompts)
        return original(self, prompts)

    monkeypatch.setattr(TextEncoders, "encode", counted)
    progress: list[tuple[int, int]] = []
    prepare_embeddings(
        encoders, PROMPTS, tmp_path / "e", **JOB, report=lambda done, total: progress.append((done, total))
    )
    assert [prompt for prompt in seen if prompt] == ["a cat", "a dog", "red", "big cat", "the end", "one", "two"]
    assert progress == sorted(progress)
    assert {(4, 10), (8, 10)} < set(progress)
    assert progress[-1] == (10, 10)
    stored = StoredEmbeddings(tmp_path / "e")
    assert (len(stored), stored.num_distinct) == (10, 7)


class Interrupted(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("finished", [0, 1, 2])
@pytest.mark.parametrize("at", ["write_tensors", "write_manifest"])
def test_an_interrupted_job_ends_in_the_same_bytes(
    encoders: TextEncoders, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int, at: str
) -> None:
    """Killed before or after the shard following `finished` whole ones is written."""
    place = shards if at == "write_manifest" else module
    folder, original, calls = tmp_path / "parts", getattr(place, at), []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == finished + 1:
            raise Interrupted
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, at, interrupted)
        with pytest.raises(Interrupted):
            prepare_embeddings(encoders, PROMPTS, folder, **JOB)
        with pytest.raises(UserError, match="is unfinished: run the same `fewstep prepare embeddings` command again"):
            StoredEmbeddings(folder)
        prepare_embeddings(encoders, PROMPTS, folder, **JOB)
    assert len(calls) == 4  # three shards and the one call that failed: what is done is not made again
    assert files_of(folder) == files_of(whole)


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_damaged_shard_is_remade(encoders: TextEncoders, whole: Path, shard: int) -> None:
    before = files_of(whole)
    path = whole / f"embeddings_{shard:05d}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{path.name} .*`fewstep prepare embeddings`"):
        StoredEmbeddings(whole)
    prepare_embeddings(encoders, PROMPTS, whole, **JOB)
    assert files_of(whole) == before


@pytest.mark.parametrize(
    ("prompts", "changes", "told"),
    [
        (PROMPTS[:-1], {}, "num_prompts was 10, is 9"), ([*PROMPTS[:-1], "three"], {}, "prompts was '"),
        (PROMPTS, {"shard_size": 5}, "shard_size was 4, is 5"),
        (PROMPTS, {"truncate": True}, "truncate_prompts was False, is True"),
    ],
)  # fmt: skip
def test_another_job_is_refused(
    encoders: TextEncoders, whole: Path, prompts: list[str], changes: dict[str, Any], told: str
) -> None:
    before = files_of(whole)
    with pytest.raises(UserError) as error:
        prepare_embeddings(encoders, prompts, whole, **{**JOB, **changes})
    assert str(error.value).startswith(f"{whole} holds other embeddings: ")
    assert told in str(error.value)
    assert str(error.value).endswith("; choose another folder")
    assert files_of(whole) == before


def test_other_encoders_are_refused(encoders: TextEncoders, whole: Path, tmp_path: Path) -> None:
    make = {"sd": tiny_sd_folder, "sdxl": tiny_sdxl_folder}[encoders.family]
    other = family_named(encoders.family).text_encoders(make(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match="holds other embeddings: text_encoders was '"):
        prepare_embeddings(other, PROMPTS, whole, **JOB)


def test_no_and_long_prompts(encoders: TextEncoders, tmp_path: Path) -> None:
    """The limit counts the two marks at the ends; nothing is written before all prompts are looked at."""
    fits, long = " ".join("cat" for _ in range(MAX_TOKENS - 2)), " ".join("cat" for _ in range(MAX_TOKENS - 1))
    folder = tmp_path / "e"
    for prompts, told in (
        ([], "there are no prompts to embed"),
        (["a", "b", long], f"prompt 3 of the list has {MAX_TOKENS + 1} tokens, the text encoder takes {MAX_TOKENS} ("),
    ):
        with pytest.raises(UserError) as error:
            prepare_embeddings(encoders, prompts, folder)
        assert told in str(error.value)
        assert not folder.exists()
    assert str(error.value).endswith("; shorten it, or cut all long ones with truncate=True")
    with pytest.raises(UserError, match=r"cut all long ones with --a-callers-own$"):
        prepare_embeddings(encoders, prompts, folder, cut_with="--a-callers-own")
    stored = StoredEmbeddings(prepare_embeddings(encoders, [fits, long], folder, truncate=True))
    text, *_ = stored.rows(torch.tensor([0, 1]))
    torch.testing.assert_close(text[0].float(), text[1].float(), atol=2e-3, rtol=2e-3)


def test_embeddings_that_float16_cannot_hold(
    encoders: TextEncoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TextEncoders.encode
    monkeypatch.setattr(
        TextEncoders, "encode", lambda self, prompts: TextEmbeddings(*[
            None if part is None else part + 1e6 for part in original(self, prompts)
        ]),
    )  # fmt: skip
    with pytest.raises(UserError, match="an embedding is not finite as float16"):
        prepare_embeddings(encoders, ["a"], tmp_path / "e")


def test_the_manifest_says_what_was_made(encoders: TextEncoders, whole: Path) -> None:
    manifest = json.loads((whole / MANIFEST).read_text())
    assert manifest["complete"]
    job = manifest["job"]
    assert (job["family"], job["num_prompts"], job["shard_size"], job["truncate_prompts"]) == (
        encoders.family, 10, 4, False,
    )  # fmt: skip
    assert len(job["text_encoders"]) == len(job["prompts"]) == 64
    assert [entry["rows"] for entry in manifest["shards"]] == [4, 4, 2]


def test_the_empty_prompt_is_one(encoders: TextEncoders, tmp_path: Path) -> None:
    stored = StoredEmbeddings(prepare_embeddings(encoders, ["a", "", "b", ""], tmp_path / "e"))
    assert stored.prompts() == ["a", "", "b", ""]
    assert (stored.num_distinct, stored.num_empty) == (3, 2)
    torch.testing.assert_close(
        stored.rows(torch.tensor([3]))[0].float(), encoders.encode([""]).text, atol=2e-3, rtol=2e-3
    )


def gigabytes(encoders: TextEncoders, prompts: list[str]) -> float:
    empty = encoders.encode_empty()
    return len(prompts) * 2 * (empty.text.numel() + (0 if empty.pooled is None else empty.pooled.numel())) / 1e9


def test_the_size_is_said_before_anything_is_stored(
    encoders: TextEncoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Distinct prompts count; above a limit, or half of the free disk, they are refused and no folder is made."""
    prompts = ["a", "b", "c"]
    size = gigabytes(encoders, prompts)
    monkeypatch.setattr(module, "_WORTH_SAYING", 0.0)
    folder = tmp_path / "e"
    with pytest.raises(UserError) as error:
        prepare_embeddings(encoders, [*prompts, "a"], folder, max_gigabytes=size / 2, spare_with="compute them")
    limit = f"more than {size / 2:g} GB are not stored unasked"
    assert str(error.value) == f"{folder}: embeddings of 3 prompts would take {size:,.3g} GB, and {limit}; compute them"
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=int(1.9e9 * size)))
        with pytest.raises(UserError, match=r"and the disk has .* GB free, of which half may be filled; encode them"):
            prepare_embeddings(encoders, prompts, folder)
    assert not folder.exists()
    assert capsys.readouterr().err == ""
    prepare_embeddings(encoders, prompts, folder, max_gigabytes=2 * size)
    assert capsys.readouterr().err.startswith(f"{folder}: embeddings of 3 prompts will take {size:,.3g} GB, ")
    prepare_embeddings(encoders, prompts, folder, max_gigabytes=0.0)  # it is there already
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("tokens", "width", "pooled", "told"), [(77, 768, 0, "355 GB"), (77, 2048, 1280, "954 GB")])
def test_three_million_prompts(tmp_path: Path, tokens: int, width: int, pooled: int, told: str) -> None:
    """Stable Diffusion 1.5 and SDXL."""
    with pytest.raises(UserError, match=rf"would take {told}, and more than 20 GB are not stored unasked; say so"):
        announce_size(tmp_path / "e", "it", 3_000_000 * 2 * (tokens * width + pooled), "say so", max_gigabytes=20.0)


def test_half_a_character_is_no_prompt(encoders: TextEncoders) -> None:
    """As bytes of a command line that are not UTF-8 come, and JSON's lone surrogates."""
    for use in (encoders.count_tokens, lambda prompt: encoders.encode([prompt])):
        with pytest.raises(UserError, match="holds half a character; type it again, as UTF-8"):
            use("a cat \udcff")
