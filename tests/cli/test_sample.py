"""`fewstep sample`: seeds, labels, sizes, negative prompts, TAESD, precisions, compilation, metadata, and each refusal."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep import __version__, devices
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.families.edm.unet import EDMUNetConfig
from fewstep.formats.model_folder import ModelCard, write_model_folder
from fewstep.formats.pixels import make_grid, to_uint8
from fewstep.models import sampling as commands_sample
from fewstep.models.load import load_generator, load_teacher
from fewstep.models.model import Model
from fewstep.networks.adapters import LoraShape
from tests.cli.test_main import Answer
from tests.cli.test_main import fewstep as run
from tests.conftest import tiny_denoiser
from tests.export.text_generators import load, write_run
from tests.tiny_models import MAX_TOKENS, tiny_sdxl_folder, tiny_taesd_folder

# importing torch's compiler warns about torch's own use of torch.jit
torch_warns = pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-step generator of four named classes."""
    folder, denoiser = tmp_path_factory.mktemp("classes") / "generator", tiny_denoiser(seed=3)
    card = ModelCard(role="generator", step_indices=(999, 499), class_names=("cat", "dog", "fox", "owl"))
    write_model_folder(folder, denoiser.describe(), denoiser.state_dict(), card)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a two-step SDXL generator."""
    return write_run(tmp_path_factory.mktemp("text"), "sdxl", (999, 499))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl_folder(tmp_path_factory.mktemp("teacher") / "sdxl")


def sample(*arguments: object) -> Answer:
    answer = run("sample", *arguments, "--device", "cpu")
    assert answer.code == 0, answer.err
    return answer


def refused(*arguments: object) -> str:
    """The one sentence a bad command line ends with."""
    answer = run("sample", *arguments, "--device", "cpu")
    assert (answer.code, answer.out) == (2, "")
    lines = answer.err.splitlines()  # lines that end in dots say what takes more than a second on a busy machine
    (line,) = [line for line in lines if not line.startswith("warning: precision") and not line.endswith(" ...")]
    assert line.startswith("fewstep: ")
    return line.removeprefix("fewstep: ")


def opened(out: Path) -> list[tuple[np.ndarray, dict[str, str]]]:
    """Pixels and facts of a folder's pictures."""
    found = []
    for path in sorted(out.iterdir()):
        with Image.open(path) as picture:
            facts = {name.removeprefix("fewstep:"): value for name, value in picture.text.items()}  # type: ignore[attr-defined]
            found.append((np.asarray(picture), facts))
    return found


def assert_shows(out: Path, images: Tensor) -> list[dict[str, str]]:
    """The folder holds these pictures, to one grey level."""
    found = opened(out)
    expected = to_uint8(images).permute(0, 2, 3, 1).squeeze(-1).numpy()
    assert len(found) == len(expected)
    for (pixels, _), wanted in zip(found, expected, strict=True):
        assert np.abs(pixels.astype(int) - wanted).max() <= 1
    return [facts for _, facts in found]


def class_model(folder: Path) -> Model:
    model = load_generator(folder, device="cpu")
    assert model.is_generator
    return model


# --- Seeds, labels, series


def test_seeds_give_each_seeds_first_picture(classes: Path, tmp_path: Path) -> None:
    """For every batch size the same, and what --seed makes; labels outside, seeds inside."""
    model = class_model(classes)
    expected = torch.cat(
        [model.sample(1, labels=[label], seed=seed, output="tensor") for label in (3, 1) for seed in (7, 9, 10)]
    )
    for size in (1, 4, 64):
        out = tmp_path / str(size)
        grid = tmp_path / "grid.png"
        sample(classes, "--labels", "3,1", "--seeds", "7,9-10", "--out", out, "--grid", grid, "--batch-size", size)
        facts = assert_shows(out, expected)
        assert [(fact["seed"], fact["image"], fact["label"]) for fact in facts] == [
            (seed, "0", label) for label in "31" for seed in ("7", "9", "10")
        ]
        with Image.open(grid) as picture:
            assert picture.size == make_grid(expected, columns=3).size
    sample(classes, "--labels", "3", "--seed", 9, "--out", tmp_path / "one")
    assert np.array_equal(opened(tmp_path / "one")[0][0], opened(tmp_path / "64")[1][0])
    assert not np.array_equal(opened(tmp_path / "64")[0][0], opened(tmp_path / "64")[1][0])


def test_seeds_of_prompts(text: Path, tmp_path: Path) -> None:
    """One seed given as --seeds is the same noise for both prompts, unlike the series of --seed."""
    model = load(text)
    for seeds in ((4,), (4, 2**64 - 1)):
        out = tmp_path / str(len(seeds))
        given = ",".join(map(str, seeds))
        sample(text, "--prompt", "red cat", "--prompt", "a dog", "--seeds", given, "--out", out, "--batch-size", 3)
        expected = [
            model.sample([prompt], seed=seed, output="tensor") for prompt in ("red cat", "a dog") for seed in seeds
        ]
        assert_shows(out, torch.cat(expected))


def test_seeds_refuse_what_does_not_go_with_them(classes: Path, tmp_path: Path) -> None:
    assert "leave out --seed" in refused(classes, "--seeds", "1", "--seed", 0, "--out", tmp_path / "out")
    assert "give --labels, e.g. 0-3" in refused(classes, "--seeds", "1", "--out", tmp_path / "out")
    assert refused(classes, "--seeds", "x", "--out", tmp_path / "out").startswith("--seeds x: ")
    assert not (tmp_path / "out").exists()


def test_python_wants_a_seed_an_image(classes: Path) -> None:
    with pytest.raises(ValueError, match="2 seeds for 3 images"):
        class_model(classes).sample(3, seed=(1, 2), output="tensor")


def test_labels_from_a_file(classes: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("3\n0\n2\n")
    sample(classes, "--labels", tmp_path / "labels.txt", "--out", tmp_path / "out")
    facts = assert_shows(tmp_path / "out", class_model(classes).sample(3, labels=[3, 0, 2], output="tensor"))
    assert [fact["label"] for fact in facts] == ["3", "0", "2"]
    (tmp_path / "labels.txt").write_text("3\n4\n")
    words = refused(classes, "--labels", tmp_path / "labels.txt", "--out", tmp_path / "no")
    assert words == "--labels [4] do not fit the model's 4 classes"
    assert not (tmp_path / "no").exists()


def test_a_series_in_parts(classes: Path, tmp_path: Path) -> None:
    for first in (0, 3):
        sample(classes, "--first", first, "--num-images", 3, "--seed", 5, "--out", tmp_path / "out")
    facts = assert_shows(tmp_path / "out", class_model(classes).sample(6, seed=5, output="tensor"))
    assert [fact["image"] for fact in facts] == list("012345")


# --- Metadata and throughput


def test_a_picture_says_how_it_was_made(classes: Path, teacher: Path, tmp_path: Path) -> None:
    grid = tmp_path / "grid.png"
    sample(classes, "--labels", 2, "--seed", 4, "--out", tmp_path / "class", "--grid", grid, "--precision", "bf16")
    common = {"model": str(classes), "schedule": "999,499 of 1000", "evaluations": "2", "precision": "bf16"}
    common |= {"version": __version__, "seed": "4", "size": "16x16", "label": "2"}
    assert opened(tmp_path / "class")[0][1] == {**common, "image": "0", "class": "fox"}
    with Image.open(grid) as picture:
        facts = {name.removeprefix("fewstep:"): value for name, value in picture.text.items()}  # type: ignore[attr-defined]
    assert facts == common
    sample(
        teacher, "--prompt", "red cat, é", "--teacher-steps", 2, "--guidance-scale", 3, "--negative-prompt", "dog",
        "--size", "8x16", "--out", tmp_path / "text",
    )  # fmt: skip
    assert opened(tmp_path / "text")[0][1] == {
        "model": str(teacher), "schedule": "2 DDIM steps", "evaluations": "2", "precision": "fp32",
        "version": __version__, "guidance_scale": "3.0", "negative_prompt": "dog", "seed": "0", "image": "0",
        "size": "8x16", "prompt": "red cat, é",
    }  # fmt: skip


def test_throughput_leaves_the_first_batch_out(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 100.0, 200.0, 202.0, 300.0, 302.0, 400.0, 409.0])
    monkeypatch.setattr(commands_sample, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    answer = sample(classes, "--num-images", 7, "--batch-size", 2, "--grid", tmp_path / "a.png")
    rate = "1.0 images/s, 1 s an image (the first batch, which warms up, not counted)"
    assert f"7 pictures, 2 evaluations each, 16x16: {rate}" in answer.err
    times = iter([0.0, 8.0])
    answer = sample(classes, "--num-images", 4, "--grid", tmp_path / "a.png")
    assert "0.5 images/s, 2 s an image (warm-up included)" in answer.err


# --- Sizes


def test_a_size_of_its_own(text: Path, tmp_path: Path) -> None:
    """Height first; SDXL's time ids follow; any batch gives the same picture."""
    sample(text, "--prompt", "cat", "--prompt", "dog", "--size", "24x16", "--out", tmp_path / "out")
    images = load(text).sample(["cat", "dog"], size=(24, 16), output="tensor")
    assert images.shape == (2, 3, 24, 16)
    assert_shows(tmp_path / "out", images)
    assert (load(text).sample(["dog"], size=(24, 16), first=1, output="tensor") - images[1:]).abs().max() < 1e-4
    model = load(text)
    condition = model.conditioner.table(["cat"], (24, 16)).rows(torch.tensor([0]))
    assert condition["time_ids"].tolist() == [[24, 16, 0, 0, 24, 16]]


def test_bad_sizes_are_refused(text: Path, classes: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    words = "--size 18x16: this model makes pictures whose sides are multiples of 4"
    assert refused(text, "--prompt", "cat", "--size", "18x16", *out) == words
    assert refused(text, "--prompt", "cat", "--size", "0", *out).startswith("--size 0x0: ")
    assert refused(text, "--prompt", "cat", "--size", "big", *out).startswith("--size big: give height x width")
    words = "--size is for text-to-image models; this network was built for 16x16 alone"
    assert refused(classes, "--size", "32", *out) == words
    assert not (tmp_path / "out").exists()


def test_sd3_has_positions_up_to_its_largest_size(tmp_path: Path) -> None:
    run_folder = write_run(tmp_path, "sd3", (999, 499))
    images = load(run_folder).sample(["cat"], size=(32, 8), output="tensor")
    assert images.shape == (1, 3, 32, 8)
    assert images.std() > 0.01
    words = refused(run_folder, "--prompt", "cat", "--size", "64x16", "--out", tmp_path / "out")
    assert words == "--size 64x16: this model has positions for sides up to 32"


# --- Guidance and negative prompts


def test_a_few_step_teacher_is_not_guided(teacher: Path, tmp_path: Path) -> None:
    """A folder whose scheduler is LCM's: unguided unless asked, and refused when asked."""
    folder = tmp_path / "lcm"
    shutil.copytree(teacher, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "LCMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({**config, "_class_name": "LCMScheduler"}))
    command = (folder, "--prompt", "cat", "--teacher-steps", 2)
    sample(*command, "--out", tmp_path / "out")
    [picture] = (tmp_path / "out").glob("*.png")
    with Image.open(picture) as opened:
        assert opened.info["fewstep:guidance_scale"] == "1.0"
    words = refused(*command, "--guidance-scale", 7.5, "--out", tmp_path / "refused")
    assert words.startswith(
        "--guidance-scale: guidance_scale=7.5: this is a few-step model, by its scheduler or its name"
    )
    assert not (tmp_path / "refused").exists()
    (tmp_path / "prompts.txt").write_text("cat\n")
    reference = ("--features", "bundled:emoji", "--reference", "bundled:emoji/reference_train.npz")
    options = ("--prompts", tmp_path / "prompts.txt", "--guidance-scale", 2, "--device", "cpu")
    answer = run("evaluate", folder, *reference, *options)
    assert (answer.code, answer.out) == (2, "")
    assert "guidance_scale=2.0: this is a few-step model, by its scheduler or its name" in answer.err


def test_a_negative_prompt_leads_the_teacher_away(teacher: Path, tmp_path: Path) -> None:
    """SDXL's unconditional branch is zeros; with a negative prompt it is that prompt, as in diffusers."""
    model = load_teacher(teacher, device="cpu")
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0}
    expected = model.sample(["cat"], negative_prompt="red dog", **options, output="tensor")
    command = (teacher, "--prompt", "cat", "--teacher-steps", 2, "--guidance-scale", 4)
    sample(*command, "--negative-prompt", "red dog", "--out", tmp_path / "out")
    assert_shows(tmp_path / "out", expected)
    plain = model.sample(["cat"], **options, output="tensor")
    assert (plain - expected).abs().max() > 1e-2
    # guidance between two prompts is symmetric: w (cat - dog) + dog
    swapped = model.sample(
        ["red dog"], negative_prompt="cat", num_inference_steps=2, guidance_scale=-3.0, output="tensor"
    )
    assert (swapped - expected).abs().max() < 1e-3


def test_negative_prompts_are_refused_with_the_reason(text: Path, teacher: Path, classes: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    words = refused(text, "--prompt", "cat", "--negative-prompt", "dog", *out)
    assert words.startswith("--negative-prompt: a generator runs without guidance (its teacher's was distilled in)")
    words = refused(teacher, "--prompt", "cat", "--negative-prompt", "dog", "--guidance-scale", 1, *out)
    assert words == "--negative-prompt acts through guidance, which --guidance-scale 1 switches off"
    words = refused(classes, "--negative-prompt", "dog", *out)
    assert words == "--negative-prompt is for text-to-image teachers; this model has classes"
    assert not (tmp_path / "out").exists()


def test_a_generators_steps_are_its_own(classes: Path, teacher: Path, tmp_path: Path) -> None:
    words = refused(classes, "--teacher-steps", 3, "--out", tmp_path / "out")
    assert words.startswith("--teacher-steps is for teachers")
    words = refused(teacher, "--prompt", "cat", "--teacher-steps", 1001, "--out", tmp_path / "out")
    assert words.startswith("--teacher-steps 1001: the model has 1000 noise levels")


# --- TAESD


def test_a_tiny_vae_decodes(text: Path, tmp_path: Path) -> None:
    tiny = tiny_taesd_folder(tmp_path / "taesd")
    sample(text, "--prompt", "cat", "--tiny-vae", tiny, "--out", tmp_path / "out")
    model = load(text)
    own = model.sample(["cat"], output="tensor")
    model.decoder = model.tiny_decoder(tiny)
    expected = model.sample(["cat"], output="tensor")
    assert (own - expected).abs().max() > 0.05
    assert assert_shows(tmp_path / "out", expected)[0]["tiny_vae"] == str(tiny)


def test_bad_tiny_vaes_are_refused(text: Path, classes: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    tiny = tiny_taesd_folder(tmp_path / "taesd", latent_channels=16)
    assert refused(text, "--prompt", "cat", "--tiny-vae", tiny, *out).startswith(f"--tiny-vae: {tiny} decodes latents")
    assert refused(text, "--prompt", "cat", "--tiny-vae", "no", *out).startswith("--tiny-vae: no is neither")
    words = "--tiny-vae is for text-to-image models; this one makes pixels, not latents"
    assert refused(classes, "--tiny-vae", tiny, *out) == words
    assert not (tmp_path / "out").exists()


# --- Precision and compilation


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_near(text: Path, classes: Path, tmp_path: Path, precision: str) -> None:
    """The network alone: encoders and VAE stay in fp32."""
    model = load(text, precision=precision)
    images, exact = model.sample(["cat"], output="tensor"), load(text).sample(["cat"], output="tensor")
    assert 0 < (images - exact).abs().max() < 0.1
    assert next(model.decoder.autoencoder.parameters()).dtype == torch.float32
    sample(text, "--prompt", "cat", "--precision", precision, "--out", tmp_path / "text")
    assert_shows(tmp_path / "text", images)
    sample(classes, "--num-images", 2, "--precision", precision, "--out", tmp_path / "classes")
    close = class_model(classes).sample(2, output="tensor")
    for (pixels, _), wanted in zip(opened(tmp_path / "classes"), to_uint8(close)[:, 0].numpy(), strict=True):
        assert np.abs(pixels.astype(int) - wanted).max() < 8


def test_an_unknown_precision(classes: Path, tmp_path: Path) -> None:
    words = refused(classes, "--precision", "fp8", "--out", tmp_path / "out")
    assert words == "--precision fp8: choose auto, fp32, bf16 or fp16"


def test_pictures_that_are_no_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cpu_slowdown", lambda name: 1.0)  # where it is slow there is a warning, too
    denoiser = tiny_denoiser()
    with torch.no_grad():
        next(denoiser.parameters()).fill_(1e30)  # more than fp16 holds
    card = ModelCard(role="generator", step_indices=(999,))
    write_model_folder(tmp_path / "model", denoiser.describe(), denoiser.state_dict(), card)
    words = refused(tmp_path / "model", "--precision", "fp16", "--out", tmp_path / "out")
    assert words == "--precision fp16: pictures came out as NaN; take bf16 or fp32"
    assert not (tmp_path / "out").exists()


@torch_warns
def test_compile_runs_the_blocks(classes: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of each family goes through torch.compile, here with the backend that runs it as it is."""
    compiled: list[str] = []
    original = torch.compile

    def eager(model: Any, *args: Any, **options: Any) -> Any:
        compiled.append(getattr(model, "__self__", model).__class__.__name__)
        return original(model, *args, **{**options, "backend": "eager"})

    monkeypatch.setattr(torch, "compile", eager)
    monkeypatch.setattr("fewstep.devices.check_compiler", lambda device: None)
    limits: Any = torch._dynamo.config
    with limits.patch(recompile_limit=8):
        sample(classes, "--num-images", 2, "--compile", "--out", tmp_path / "classes")
        assert_shows(tmp_path / "classes", class_model(classes).sample(2, output="tensor"))
        sample(text, "--prompt", "cat", "--compile", "--out", tmp_path / "text")
        assert_shows(tmp_path / "text", load(text).sample(["cat"], output="tensor"))
        assert limits.recompile_limit >= 3 * 2 * 8  # roles, with and without gradients, torch's own limit for one
    assert compiled == [
        "EDMUNet", "DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D", "UpBlock2D",
    ]  # fmt: skip


def test_compile_without_a_compiler(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    words = refused(classes, "--compile", "--out", tmp_path / "out")
    assert words.startswith("--compile: torch.compile needs a C++ compiler and finds none")
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@torch_warns
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compile_for_real(tmp_path: Path) -> None:
    """The same pictures through torch's own CPU backend, from the smallest network there is."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"model_channels": 8, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": ()}
    denoiser = EDMDenoiser(EDMUNetConfig("adm", img_resolution=8, img_channels=1, **shape)).eval()
    write_model_folder(
        tmp_path / "model", denoiser.describe(), denoiser.state_dict(), ModelCard(role="generator", step_indices=(999,))
    )
    sample(tmp_path / "model", "--num-images", 2, "--compile", "--out", tmp_path / "out")
    assert_shows(tmp_path / "out", class_model(tmp_path / "model").sample(2, output="tensor"))


@pytest.mark.long
@torch_warns
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compile_for_batches_of_two_sizes(classes: Path, tmp_path: Path) -> None:
    """As above, the last batch smaller than the others."""
    sample(classes, "--num-images", 5, "--batch-size", 2, "--compile", "--out", tmp_path / "out")
    assert_shows(tmp_path / "out", class_model(classes).sample(5, output="tensor"))


@torch_warns
def test_a_failed_compilation_is_one_sentence(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("C++ compile error\nmany lines")

    monkeypatch.setattr("fewstep.devices.check_compiler", lambda device: None)
    monkeypatch.setattr(Model, "sample", fail)
    words = refused(classes, "--compile", "--out", tmp_path / "out")
    assert words == "--compile failed (C++ compile error); leave it out"


@torch_warns
def test_compile_takes_a_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's blocks are compiled as they are called with the LoRA."""
    compiled: list[object] = []
    monkeypatch.setattr(
        "fewstep.families.diffusers_denoiser.DiffusersDenoiser.compile_network", lambda self: compiled.append(self)
    )
    monkeypatch.setattr("fewstep.devices.check_compiler", lambda device: None)
    folder = write_run(tmp_path, "sd", (999,), LoraShape(2, 4.0))
    sample(folder, "--prompt", "cat", "--compile", "--out", tmp_path / "out")
    assert len(compiled) == 1


# --- Output


def test_places_that_cannot_be_written_are_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands_sample, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    assert "choose another --out" in refused("model", "--out", tmp_path / "file")
    assert refused("model", "--grid", tmp_path).startswith("--grid ")
    assert refused("model", "--grid", tmp_path / "no/grid.png").startswith("--grid ")
    assert refused("model").startswith("nothing to write")


def test_full_memory_names_the_batch_size(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Model, "sample", fail)
    words = refused(classes, "--batch-size", 32, "--out", tmp_path / "out")
    assert words == "--batch-size 32: the GPU's memory is full; take fewer pictures at once"
    assert not (tmp_path / "out").exists()


def test_a_class_teacher_is_sampled_too(teacher_folder: Path, tmp_path: Path) -> None:
    sample(teacher_folder, "--labels", "1", "--seeds", "3,5", "--teacher-steps", 2, "--out", tmp_path / "out")
    model = load_teacher(teacher_folder, device="cpu")
    assert not model.is_generator
    facts = assert_shows(
        tmp_path / "out", model.sample(2, labels=[1, 1], seed=(3, 5), num_inference_steps=2, output="tensor")
    )
    assert facts[0]["schedule"] == "2 Heun steps"
    assert (
        model.sample(2, labels=[1, 1], seed=(3, 5), num_inference_steps=2, output="tensor")[1]
        - model.sample(1, labels=[1], seed=5, num_inference_steps=2, output="tensor")[0]
    ).abs().max() < 1e-5


# --- Empty and long prompts


def test_an_empty_prompt_is_a_prompt(text: Path, tmp_path: Path) -> None:
    """As in diffusers: the picture of no words, unlike a blank line of a file, which is skipped and said."""
    answer = sample(text, "--prompt", "", "--prompt", "cat", "--out", tmp_path / "out")
    assert "warning" not in answer.err
    images = load(text).sample(["", "cat"], output="tensor")
    assert_shows(tmp_path / "out", images)
    assert (images[0] - images[1]).abs().max() > 1e-3
    assert Image.open(tmp_path / "out/00000.png").text["fewstep:prompt"] == ""  # type: ignore[attr-defined]
    (tmp_path / "prompts.txt").write_text("cat\n\ndog\n")
    answer = sample(text, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "other")
    assert f"{tmp_path / 'prompts.txt'}: 1 blank lines skipped\n" in answer.err
    assert len(list((tmp_path / "other").glob("*.png"))) == 2


def test_a_long_prompt_is_cut_with_one_warning_of_ours(
    text: Path, teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """It quotes what is lost; neither library adds its own words, in any batch."""
    kept = " ".join(["cat"] * (MAX_TOKENS - 2))
    long = f"{kept} red dog"
    command = ("--prompt", long, "--prompt", "cat", "--num-images", 6, "--batch-size", 1)
    answer = sample(text, *command, "--out", tmp_path / "out")
    found = [line for line in answer.err.splitlines() if "warning" in line]
    assert found == [
        f"warning: the text encoders read {MAX_TOKENS} tokens of a prompt; of {long[:40]!r}... ({MAX_TOKENS + 2} tokens) "
        "the pictures will not show 'red dog'"
    ]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert "truncated" not in "".join(capfd.readouterr()) + answer.err
    images = load(text).sample([long, kept], output="tensor")
    assert (load(text).sample([kept], output="tensor")[0] - images[0]).abs().max() < 1e-5
    options = ("--teacher-steps", 1, "--guidance-scale", 2, "--prompt", long, "--negative-prompt", f"{long} cat")
    both = sample(teacher, *options, "--out", tmp_path / "both").err
    assert both.count("warning") == 1
    assert "'red dog', and parts of 1 other prompt" in both
    assert load(text).conditioner.warnings(["cat", kept]) == []
