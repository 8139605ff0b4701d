"""`fewstep sample` on text-to-image models: prompts in, pictures that say where they come from out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import __version__
from fewstep.formats.model_folder import ModelCard, write_model_folder
from fewstep.formats.pixels import make_grid, to_uint8
from fewstep.models.load import load_generator, load_teacher
from fewstep.models.model import Model
from fewstep.networks.adapters import LoraShape, SharedBase
from tests.cli.test_main import Answer
from tests.cli.test_main import fewstep as run
from tests.conftest import tiny_denoiser
from tests.tiny_models import tiny_sd_folder


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd_folder(tmp_path_factory.mktemp("models") / "sd")


def load(folder: Path) -> Model:
    teacher = load_teacher(folder, device="cpu")
    return teacher


@pytest.fixture(scope="module", params=["network", "lora"])
def generator_folder(
    request: pytest.FixtureRequest, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A two-step generator as `fewstep train` writes it, a run folder around it: whole, or a LoRA on its teacher."""
    folder, teacher = tmp_path_factory.mktemp("run"), load(teacher_folder)
    network = teacher.denoiser
    if request.param == "lora":
        network = SharedBase(teacher.denoiser, LoraShape(2, 4.0)).add_role("generator")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    teacher.student(network, ModelCard(role="generator", step_indices=(999, 499))).write(folder / "generator")
    return folder


def sample(*arguments: object) -> Answer:
    return run("sample", *arguments, "--device", "cpu")


def assert_pictures(out: Path, images: torch.Tensor) -> list[dict[str, str]]:
    """The folder holds these pictures and nothing else; returns what each says about itself."""
    assert sorted(path.name for path in out.iterdir()) == [f"{number:05d}.png" for number in range(len(images))]
    facts = []
    for number, pixels in enumerate(to_uint8(images).permute(0, 2, 3, 1).numpy()):
        with Image.open(out / f"{number:05d}.png") as picture:
            assert np.array_equal(np.asarray(picture), pixels)
            facts.append(dict(picture.text))  # type: ignore[attr-defined]
    return facts


def assert_refused(answer: Answer, sentence: str) -> None:
    """Exit code 2 and one sentence on one line."""
    assert answer == Answer(2, "", f"fewstep: {sentence}\n")


def test_a_teacher_makes_one_picture_a_prompt(teacher_folder: Path, tmp_path: Path) -> None:
    answer = sample(
        teacher_folder, "--prompt", "red cat", "--prompt", "a dog", "--seed", 4, "--teacher-steps", 3,
        "--guidance-scale", 5, "--out", tmp_path / "out", "--grid", tmp_path / "grid.png",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "2 pictures, 3 evaluations each" in answer.err
    images = load(teacher_folder).sample(
        ["red cat", "a dog"], seed=4, num_inference_steps=3, guidance_scale=5.0, output="tensor"
    )
    assert (images[0] - images[1]).abs().max() > 1e-2
    facts = assert_pictures(tmp_path / "out", images)
    assert facts == [
        {
            "fewstep:model": str(teacher_folder), "fewstep:seed": "4", "fewstep:image": str(number),
            "fewstep:evaluations": "3", "fewstep:prompt": prompt, "fewstep:schedule": "3 DDIM steps",
            "fewstep:guidance_scale": "5.0", "fewstep:precision": "fp32", "fewstep:version": __version__,
            "fewstep:size": "16x16",
        }
        for number, prompt in enumerate(["red cat", "a dog"])
    ]  # fmt: skip
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.tobytes() == make_grid(images, columns=1).tobytes()


def test_a_teacher_is_guided_unless_told_otherwise(teacher_folder: Path, tmp_path: Path) -> None:
    """Its family's by default, 7.5."""
    sample(teacher_folder, "--prompt", "cat", "--teacher-steps", 2, "--out", tmp_path / "a")
    sample(teacher_folder, "--prompt", "cat", "--teacher-steps", 2, "--guidance-scale", 1, "--out", tmp_path / "b")
    guided = load(teacher_folder).sample(["cat"], num_inference_steps=2, guidance_scale=7.5, output="tensor")
    plain = load(teacher_folder).sample(["cat"], num_inference_steps=2, guidance_scale=1.0, output="tensor")
    assert not torch.equal(to_uint8(guided), to_uint8(plain))
    assert_pictures(tmp_path / "a", guided)
    assert_pictures(tmp_path / "b", plain)


def test_a_generator_reads_a_file_of_prompts(generator_folder: Path, tmp_path: Path) -> None:
    """--prompt first, then the file; each in the generator's own steps."""
    (tmp_path / "prompts.txt").write_text("a dog\nblue bird, é\n", encoding="utf-8")
    answer = sample(
        generator_folder, "--prompt", "red cat", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out",
        "--batch-size", 2,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "3 pictures, 2 evaluations each" in answer.err
    generator = load_generator(generator_folder, device="cpu")
    prompts = ["red cat", "a dog", "blue bird, é"]
    facts = assert_pictures(tmp_path / "out", generator.sample(prompts, batch_size=2, output="tensor"))
    assert [fact["fewstep:prompt"] for fact in facts] == prompts
    assert {fact["fewstep:evaluations"] for fact in facts} == {"2"}


def test_prompts_take_turns(generator_folder: Path, tmp_path: Path) -> None:
    answer = sample(
        generator_folder, "--prompt", "cat", "--prompt", "dog", "--num-images", 3, "--out", tmp_path / "out"
    )
    assert answer.code == 0, answer.err
    generator = load_generator(generator_folder, device="cpu")
    facts = assert_pictures(tmp_path / "out", generator.sample(["cat", "dog", "cat"], output="tensor"))  # type: ignore[arg-type]
    assert [fact["fewstep:prompt"] for fact in facts] == ["cat", "dog", "cat"]
    with Image.open(tmp_path / "out/00000.png") as first, Image.open(tmp_path / "out/00002.png") as third:
        assert first.tobytes() != third.tobytes()  # the same prompt from other noise


@pytest.mark.parametrize("words", [["--labels", "0,1"], [], ["--labels", "0", "--prompt", "cat"]])
def test_labels_and_missing_prompts_are_refused(teacher_folder: Path, tmp_path: Path, words: list[str]) -> None:
    answer = sample(teacher_folder, *words, "--out", tmp_path / "out")
    assert_refused(answer, "a text-to-image model takes --prompt or --prompts (and no --labels)")
    assert not (tmp_path / "out").exists()


def test_a_generator_without_a_prompt_is_refused(generator_folder: Path, tmp_path: Path) -> None:
    answer = sample(generator_folder, "--out", tmp_path / "out")
    assert_refused(answer, "a text-to-image model takes --prompt or --prompts (and no --labels)")


def test_a_generator_has_its_guidance_built_in(generator_folder: Path, tmp_path: Path) -> None:
    answer = sample(generator_folder, "--prompt", "cat", "--guidance-scale", 3, "--out", tmp_path / "out")
    assert_refused(answer, "--guidance-scale 3.0: a generator has its guidance built in; leave it out")
    assert not (tmp_path / "out").exists()
    assert sample(generator_folder, "--prompt", "cat", "--guidance-scale", 1, "--out", tmp_path / "out").code == 0


def test_a_class_model_takes_no_prompt(tmp_path: Path) -> None:
    denoiser = tiny_denoiser()
    card = ModelCard(role="generator", step_indices=(999,))
    write_model_folder(tmp_path / "model", denoiser.describe(), denoiser.state_dict(), card)
    answer = sample(tmp_path / "model", "--prompt", "cat", "--out", tmp_path / "out")
    assert_refused(answer, "--prompt and --prompts are for text-to-image models; this one takes --labels")


def test_a_missing_file_of_prompts_is_named(teacher_folder: Path, tmp_path: Path) -> None:
    answer = sample(teacher_folder, "--prompts", tmp_path / "nothing.txt", "--out", tmp_path / "out")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("fewstep: ")
    assert answer.err.count("\n") == 1
    assert str(tmp_path / "nothing.txt") in answer.err


def test_an_empty_file_of_prompts_is_refused(teacher_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n\n")
    answer = sample(teacher_folder, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("fewstep: ")
    assert answer.err.count("\n") == 1


def test_a_generator_whose_teacher_is_gone_says_where_it_looked(tmp_path: Path) -> None:
    teacher = load(tiny_sd_folder(tmp_path / "sd"))
    card = ModelCard(role="generator", step_indices=(999,))
    teacher.student(teacher.denoiser, card).write(tmp_path / "generator")
    (tmp_path / "sd").rename(tmp_path / "moved")
    answer = sample(tmp_path / "generator", "--prompt", "cat", "--out", tmp_path / "out")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.count("\n") == 1
    assert f"{tmp_path / 'generator'} reads its text encoders and VAE from {tmp_path / 'sd'}" in answer.err
