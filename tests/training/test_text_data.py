"""What a text-to-image run reads: prompts that fit, and text encoders that are gone once prompts are stored."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

import fewstep
from fewstep.data.latents import StoredEmbeddings
from fewstep.data.noise_image_pairs import PROMPT_EMBEDDINGS, NoiseImagePairs
from fewstep.diffusion.samplers import sample_euler
from fewstep.errors import UserError
from fewstep.networks.frozen_layers import FrozenLinear
from fewstep.settings import TrainSettings, parse_settings
from fewstep.training import text_data
from fewstep.training.build import open_teacher
from fewstep.training.distill import DistillationJob
from fewstep.training.inputs import check_pairs
from fewstep.training.text_data import open_prompts
from tests.cli.test_main import fewstep as run
from tests.conftest import relative_error
from tests.data.test_captioned_images import write_folder
from tests.tiny_models import MAX_TOKENS, tiny_sdxl_folder

LONG = " ".join("cat" for _ in range(MAX_TOKENS))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl_folder(tmp_path_factory.mktemp("models") / "sdxl")


def settings(
    model: Path, folder: Path, prompts: list[str], memory: dict[str, object] | None = None, **data: object
) -> TrainSettings:
    """One-step DMD2 without GAN."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    return parse_settings(
        TrainSettings,
        {
            "teacher": {"path": str(model)}, "data": {"prompts": str(folder / "prompts.txt"), **data}, "memory": memory or {},
            "training": {"num_steps": 1, "batch_size": 2},
            "compute": {"device": "cpu", "precision": "fp32"},
            "run": {"folder": str(folder / "run"), "sample_images": 2},
        },
        "test",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stored", "computed"])
def test_text_encoders_leave_memory_once_prompts_are_stored(model: Path, tmp_path: Path, kind: str) -> None:
    """Nothing of a job holds them, neither the teacher nor its generator; "computed" keeps them, as it must."""
    chosen = settings(model, tmp_path, ["red cat", "a dog"], text_embeddings=kind)
    teacher = open_teacher(chosen)
    parts = [weakref.ref(part) for part in teacher.conditioner.encoders.modules]
    weights = [weakref.ref(weight) for part in teacher.conditioner.encoders.modules for weight in part.parameters()]
    job = DistillationJob(chosen, teacher)
    job.step(0, 0.0)
    assert job.sample_images(0, 2).shape == (2, 3, 16, 16)
    gc.collect()
    alive = [part for part in (*parts, *weights) if part() is not None]
    kept = kind == "computed"
    assert len(alive) == (len(parts) + len(weights) if kept else 0)
    assert ("encoders" in vars(job.teacher.conditioner)) == kept
    assert ("encoders" in vars(job.best_generator().conditioner)) == kept


@pytest.mark.parametrize(("base", "most"), [("int8", 0.01), ("nf4", 0.25)])
def test_text_encoders_that_stay_are_stored_as_the_base(model: Path, tmp_path: Path, base: str, most: float) -> None:
    """Their linear layers in 8 or 4 bits, the embeddings near float32's; those that are freed encode in float32 before."""
    prompts, index = ["red cat", "a dog"], torch.arange(2)
    plain = fewstep.load_teacher(model, device="cpu").conditioner.encoders.encode(prompts)
    memory: dict[str, object] = {"mode": "shared_base", "base": base}
    chosen = settings(model, tmp_path, prompts, memory, text_embeddings="computed")
    teacher = fewstep.load_teacher(model, device="cpu")
    table = open_prompts(chosen, teacher, tmp_path / "computed")
    layers = [layer for part in teacher.conditioner.encoders.modules for layer in part.modules()]
    assert [layer for layer in layers if type(layer) is torch.nn.Linear] == []
    assert {layer.base for layer in layers if isinstance(layer, FrozenLinear)} == {base}
    assert 0 < relative_error(table.rows(index)["text"], plain.text) < most
    stored = settings(model, tmp_path, prompts, memory)
    table = open_prompts(stored, fewstep.load_teacher(model, device="cpu"), tmp_path / "stored")
    assert torch.equal(table.rows(index)["text"], plain.text.half().float())  # as they lie on disk


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stored", "computed"])
def test_a_long_prompt_is_refused_unless_the_settings_cut_it(model: Path, tmp_path: Path, kind: str) -> None:
    """However embeddings are made; the remedy is the setting, which exists."""
    teacher = fewstep.load_teacher(model, device="cpu")
    with pytest.raises(UserError) as error:
        open_prompts(settings(model, tmp_path, ["a dog", LONG], text_embeddings=kind), teacher, tmp_path / "run")
    assert str(error.value) == (
        f"prompt 2 of the list has {MAX_TOKENS + 2} tokens, the text encoder takes {MAX_TOKENS} ({LONG[:60]!r}...); "
        "shorten it, or cut all long ones with data.truncate_prompts=true"
    )
    cut = settings(model, tmp_path, ["a dog", LONG], text_embeddings=kind, truncate_prompts=True)
    table = open_prompts(cut, teacher, tmp_path / "run")
    fitting = teacher.conditioner.encoders.encode([" ".join("cat" for _ in range(MAX_TOKENS - 2))])
    found = table.rows(torch.tensor([1]))["text"]
    assert found is not None
    assert (found - fitting.text).abs().max() < 2e-3


@pytest.mark.slow
def test_pairs_of_long_prompts(model: Path, tmp_path: Path) -> None:
    """`prepare pairs` refuses them in the words of the option that it has, and takes them with it."""
    (tmp_path / "prompts.txt").write_text(f"a dog\n{LONG}\n")
    command = ("prepare", "pairs", model, tmp_path / "pairs", "--prompts", tmp_path / "prompts.txt")
    options = ("--num-pairs", 2, "--teacher-steps", 1, "--device", "cpu")
    answer = run(*command, *options)
    assert answer.code == 2
    assert answer.err.startswith("fewstep: prompt 2 of the list has ")
    assert answer.err.endswith("; shorten it, or cut all long ones with --truncate-prompts\n")
    assert not (tmp_path / "pairs").exists()
    answer = run(*command, *options, "--truncate-prompts")
    assert answer.code == 0, answer.err
    stored = StoredEmbeddings(tmp_path / "pairs" / PROMPT_EMBEDDINGS)
    assert stored.manifest["job"]["truncate_prompts"] is True
    assert stored.prompts(torch.tensor([1])) == [LONG]


def test_truncating_is_for_text(teacher_folder: Path, tmp_path: Path) -> None:
    answer = run("prepare", "pairs", teacher_folder, tmp_path / "pairs", "--truncate-prompts", "--device", "cpu")
    assert answer.code == 2
    assert "--prompts and --truncate-prompts are for text-to-image teachers" in answer.err


def latents_of(model: Path, folder: Path, kind: str) -> Path:
    """Four pictures, one of them without a caption."""
    pictures = write_folder(folder / "pictures", ["red cat", "", "a dog", "red cat"])
    answer = run(
        "prepare", "latents", model, folder / "latents", "--images", pictures, "--resolution", 16, "--captions", kind,
        "--noise-seed", 0, "--device", "cpu",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    return folder / "latents"


GAN = {"gan_weights": [5e-3, 1e-2]}


def without_list(model: Path, folder: Path, latents: Path, **data: object) -> TrainSettings:
    chosen = settings(model, folder, ["never read"], latents=str(latents), **data).model_dump(mode="json")
    chosen["data"]["prompts"] = ""
    chosen["losses"].update(GAN)
    chosen["training"]["generator_every"] = 1
    return parse_settings(TrainSettings, chosen, "test")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "embeddings"), [("embeddings", "stored"), ("text", "computed")])
def test_without_a_list_the_prompts_are_the_captions_of_the_latents(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, embeddings: str
) -> None:
    """As published for SDXL; the same conditions whether their embeddings are stored or made at each step."""
    latents = latents_of(model, tmp_path, kind)
    chosen = without_list(model, tmp_path, latents, text_embeddings=embeddings)
    capsys.readouterr()
    teacher = open_teacher(chosen)
    job = DistillationJob(chosen, teacher)
    assert f"data.prompts is not set: the prompts are the 4 captions of {latents}\n" in capsys.readouterr().err
    assert job.conditions.names(torch.arange(4)) == ["red cat", "", "a dog", "red cat"]
    expected = fewstep.load_teacher(model, device="cpu").conditioner.encoders.encode(["red cat", ""])
    for table in (job.conditions, job.real_data.captions):
        found = table.rows(torch.tensor([3, 1]))
        assert (found["text"] - expected.text).abs().max() < 2e-3
        assert (found["pooled"] - expected.pooled).abs().max() < 2e-3
    assert all(value.isfinite() for value in job.step(0, 0.0).values())


@pytest.mark.slow
def test_captions_as_text_need_encoders(model: Path, tmp_path: Path) -> None:
    latents = latents_of(model, tmp_path, "text")
    chosen = without_list(model, tmp_path, latents)
    with pytest.raises(UserError) as error:
        DistillationJob(chosen, open_teacher(chosen))
    assert str(error.value).startswith(
        f"data.images={latents} holds its captions as text: set data.text_embeddings='computed', which "
    )


@pytest.mark.slow
def test_a_run_goes_on_with_other_prompts_where_that_is_allowed(model: Path, tmp_path: Path) -> None:
    """Their embeddings are made anew; before, the folder of those of the first session was refused either way."""
    fewstep.train(settings(model, tmp_path, ["a dog", "red cat"]))
    others = settings(model, tmp_path, ["a dog", "blue"])
    with pytest.raises(
        UserError, match=r"data\.prompts=.* holds other files than this run began with .* --data-changed"
    ):
        fewstep.train(others)
    assert StoredEmbeddings(tmp_path / "run/embeddings").prompts() == ["a dog", "red cat"]
    fewstep.train(others, data_changed=True)
    assert StoredEmbeddings(tmp_path / "run/embeddings").prompts() == ["a dog", "blue"]
    fewstep.train(others)


@pytest.mark.slow
def test_a_run_stores_no_more_than_it_was_asked_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(text_data, "MOST_GIGABYTES_UNASKED", 1e-6)
    chosen = settings(model, tmp_path, ["red cat", "a dog"])
    with pytest.raises(UserError, match=r"are not stored unasked; set data\.text_embeddings='computed', which encodes"):
        open_prompts(chosen, open_teacher(chosen), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_pairs_are_made_by_euler_and_others_are_said(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\nred cat\n")
    answer = run(
        "prepare", "pairs", model, tmp_path / "pairs", "--prompts", tmp_path / "prompts.txt", "--num-pairs", 2,
        "--teacher-steps", 2, "--device", "cpu",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    pairs = NoiseImagePairs(tmp_path / "pairs")
    chosen = settings(model, tmp_path, ["a dog"], pairs=str(tmp_path / "pairs")).model_dump(mode="json")
    chosen["losses"]["regression_weight"] = 0.25
    chosen = parse_settings(TrainSettings, chosen, "test")
    teacher = open_teacher(chosen)
    condition = teacher.conditioner.table(["a dog", "red cat"], teacher.size).rows(pairs.labels)
    expected = sample_euler(teacher.denoiser, pairs.noise.float(), condition, num_steps=2)
    torch.testing.assert_close(pairs.images.float(), expected, rtol=1e-2, atol=1e-2)
    assert check_pairs(chosen, teacher) == []
    manifest = tmp_path / "pairs/manifest.json"
    manifest.write_text(manifest.read_text().replace('"sampler"', '"older"'))
    (line,) = check_pairs(chosen, teacher)
    assert "starts from unscaled noise (an earlier version wrote it), published pairs from 0.9977 times it" in line
