"""A teacher in Z-Image's shape for a few steps on generated pictures: its folder opens in ZImagePipeline and here."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from torch import nn

import fewstep
from tests.cli.test_main import fewstep as run
from tests.examples.test_train_emoji_teacher import write_emoji

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import train_emoji_z_image as script

SIZES = {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [4, 6, 6]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("emoji")
    options = ["--steps", "2", "--batch", "4", "--sampling-steps", "2", "--text-steps", "2"]
    script.main([str(write_emoji(place / "pictures")), str(place / "run"), *options], SIZES)
    assert list((place / "run-samples").glob("*.png"))
    return place / "run"


def test_it_opens_in_the_pipeline_and_here(folder: Path) -> None:
    pipe: Any = ZImagePipeline.from_pretrained(folder)
    assert pipe.scheduler.config.shift == script.SHIFT
    teacher = fewstep.load_teacher(folder, device="cpu")
    assert teacher.size == (64, 64)
    pictures = teacher.sample(["red disc, as"], num_inference_steps=2, guidance_scale=4, output="tensor")
    assert pictures.isfinite().all()
    assert pictures.std() > 0.01


def test_training_conditions_as_the_teacher_samples(folder: Path) -> None:
    """Ids, masks and states of a draw give the velocity that the loaded teacher has for the caption."""
    pipe: Any = ZImagePipeline.from_pretrained(folder)
    teacher = fewstep.load_teacher(folder, device="cpu")
    texts = ["blue bar, bs", "a"]
    captions = script.ChatCaptions(pipe.tokenizer, texts)
    ids, lengths = (found[captions.text_of_row, 1] for found in (captions.ids, captions.lengths))
    networks = nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})
    noisy, level = torch.randn(2, 4, 16, 16), torch.tensor([0.8, 0.3])
    with torch.no_grad():
        nn.init.normal_(pipe.transformer.all_final_layer["2-1"].linear.weight)
        teacher.denoiser.load_state_dict({f"network.{n}": v for n, v in pipe.transformer.state_dict().items()})
        found = script.velocity(networks, noisy, level, ids, lengths)
        condition = teacher.conditioner.table(texts, teacher.size).rows(torch.arange(2))
        x0 = teacher.denoiser.denoise(noisy, level, condition)
    torch.testing.assert_close(noisy - level.view(-1, 1, 1, 1) * found, x0, rtol=1e-4, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_its_recipe_makes_a_student_that_the_pipeline_draws(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("red disc, as\nblue bar, bs\n", encoding="utf-8")
    answer = run(
        "train", Path(__file__).parents[2] / "recipes/emoji_z_image_dmd2_4step_lora.toml", f"teacher.path={folder}",
        f"data.prompts={tmp_path / 'prompts.txt'}", "best.files=[]", "training.num_steps=2", "training.batch_size=2",
        "run.sample_images=2", "compute.device=cpu", f"run.folder={tmp_path / 'run'}",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert run("export", tmp_path / "run", tmp_path / "out").code == 0
    pipe: Any = fewstep.load_pipeline(tmp_path / "out")
    pictures = pipe("red disc, as", num_inference_steps=4, output_type="np").images
    assert pictures.shape == (1, 64, 64, 3)
