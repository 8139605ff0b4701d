"""Text-to-image runs through the one trainer: every memory mode, resumed exactly, and the generator they write."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep
from fewstep.backbones.autoencoder import load_autoencoder
from fewstep.backbones.text_encoders import TextEncoders
from fewstep.config import TrainSettings, parse_settings
from fewstep.data.captioned_images import open_captioned_images
from fewstep.errors import UserError
from fewstep.formats.fingerprints import vae_fingerprint
from fewstep.preparation.latents import prepare_latents
from fewstep.text_model import TextGenerator
from fewstep.training.checkpoint import list_checkpoints, read_checkpoint
from fewstep.training.run import train
from tests.tiny_models import tiny_sd3_folder, tiny_sd_folder, tiny_sdxl_folder
from tests.training.helpers import _merged

PROMPTS = ["red cat", "a dog", "blue bird", "dog", "cat"]
FOLDERS = {"sd": tiny_sd_folder, "sdxl": tiny_sdxl_folder, "sd3": tiny_sd3_folder}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, prompts and captioned pictures."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    pictures = folder / "pictures"
    pictures.mkdir()
    random = np.random.default_rng(0)
    lines = []
    for number in range(6):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(pictures / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": PROMPTS[number % 5]}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    for family, make in FOLDERS.items():
        make(folder / family)
        prepare_latents(
            load_autoencoder(folder / family), TextEncoders(folder / family, family), open_captioned_images(str(pictures)),
            folder / f"latents-{family}", resolution=16, vae_fingerprint=vae_fingerprint(folder / family),
        )  # fmt: skip
    return folder


def settings(work: Path, family: str, folder: Path, **changes: dict[str, Any]) -> TrainSettings:
    """Four-step DMD2 with GAN on a tiny model."""
    values: dict[str, dict[str, Any]] = {
        "teacher": {"path": str(work / family), "guidance_scale": 3.0},
        "generator": {"step_indices": [999, 749, 499, 249]},
        "data": {"prompts": str(work / "prompts.txt"), "latents": str(work / f"latents-{family}")},
        "memory": {"lora_rank": 4},
        "losses": {"gan_generator_weight": 5e-3, "gan_discriminator_weight": 1e-2},
        "optimizer": {"generator_lr": 1e-3, "fake_score_lr": 1e-3, "warmup_steps": 2},
        "training": {"num_steps": 4, "batch_size": 3, "generator_every": 2, "seed": 3},
        "compute": {"device": "cpu", "precision": "fp32", "threads": 1},
        "run": {
            "folder": str(folder), "log_every": 2, "sample_every": 100, "checkpoint_every": 2, "sample_images": 3,
            "tensorboard": False,
        },
    }  # fmt: skip
    return parse_settings(TrainSettings, _merged(values, changes), "test")


MODES = {
    "full": {"mode": "full"},
    "full, recomputed": {"mode": "full", "checkpoint_activations": True},
    "lora_generator": {"mode": "lora_generator", "lora_rank": 4},
    "shared_base": {"mode": "shared_base", "lora_rank": 4},
    "shared_base, recomputed": {"mode": "shared_base", "lora_rank": 4, "checkpoint_activations": True},
}


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        *(("sd", mode) for mode in MODES),
        ("sdxl", "full, recomputed"),
        ("sdxl", "shared_base"),
        ("sd3", "shared_base, recomputed"),
    ],
)
def test_trains_resumes_exactly_and_writes_a_generator(work: Path, family: str, mode: str, tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {"memory": MODES[mode]}
    whole = train(settings(work, family, tmp_path / "whole", **changes))
    train(settings(work, family, tmp_path / "parts", training={"num_steps": 2}, **changes))
    parts = train(settings(work, family, tmp_path / "parts", **changes))
    expected, _ = read_checkpoint(list_checkpoints(tmp_path / "whole/checkpoints")[-1])
    found, _ = read_checkpoint(list_checkpoints(tmp_path / "parts/checkpoints")[-1])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    generator = fewstep.load_generator(whole, device="cpu")
    assert isinstance(generator, TextGenerator)
    pictures = generator.sample(["red cat", "a dog"], seed=1)
    again = fewstep.load_generator(parts, device="cpu")
    assert isinstance(again, TextGenerator)
    assert torch.equal(pictures, again.sample(["red cat", "a dog"], seed=1))
    assert (tmp_path / "whole/samples/generator_00000001.png").is_file()
    assert (tmp_path / "whole/samples/prompts.txt").read_text().splitlines() == PROMPTS[:3]
    metrics = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert any(line.get("gan_generator_norm_at_x0", 0) > 0 for line in metrics)
    teacher = fewstep.load_teacher(work / family, device="cpu")
    start = teacher.student(teacher.denoiser, generator.card).sample(["red cat", "a dog"], seed=1)  # type: ignore[attr-defined]
    assert (start - pictures).abs().max() > 1e-4  # it moved


def test_memory_modes_agree_at_the_first_step(work: Path, tmp_path: Path) -> None:
    """Before anything is trained all modes are the same three networks: the first losses are equal."""
    first = {}
    for mode, memory in MODES.items():
        folder = tmp_path / mode.replace(", ", "-")
        train(settings(work, "sdxl", folder, memory=memory, training={"num_steps": 1}))
        line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        names = ("distribution_matching_loss", "fake_score_loss", "gan_discriminator_loss", "gan_generator_loss")
        first[mode] = [line[name] for name in names]
    for mode in MODES:
        assert first[mode] == pytest.approx(first["full"], rel=1e-4), mode


def test_sd3_trains_50_steps(work: Path, tmp_path: Path) -> None:
    changes = {"training": {"num_steps": 50}, "optimizer": {"generator_lr": 1e-4, "fake_score_lr": 1e-3}}
    train(
        settings(
            work, "sd3", tmp_path / "run", run={"checkpoint_every": 50, "folder": str(tmp_path / "run")}, **changes
        )
    )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["fake_score_loss"] for line in lines if "fake_score_loss" in line]
    assert len(losses) == 50
    assert sum(losses[-10:]) < sum(losses[:10])  # the fake score follows the generator


def test_prompts_alone_are_enough_without_gan(work: Path, tmp_path: Path) -> None:
    no_gan = {"gan_generator_weight": 0.0, "gan_discriminator_weight": 0.0}
    for name, kind in (("stored", "stored"), ("computed", "computed")):
        data = {"latents": "", "text_embeddings": kind}
        train(settings(work, "sd", tmp_path / name, losses=no_gan, data=data))
    assert (tmp_path / "stored/embeddings/manifest.json").is_file()
    assert not (tmp_path / "computed/embeddings").exists()
    stored, _ = read_checkpoint(list_checkpoints(tmp_path / "stored/checkpoints")[-1])
    computed, _ = read_checkpoint(list_checkpoints(tmp_path / "computed/checkpoints")[-1])
    for name, value in stored.items():  # float16 on disk against float32
        if name.startswith("generator."):
            assert torch.allclose(value, computed[name], atol=2e-3), name


def test_noised_data_ablation_trains(work: Path, tmp_path: Path) -> None:
    generator = {"step_indices": [999, 749, 499, 249], "training_inputs": "noised_data"}
    train(settings(work, "sd", tmp_path / "run", generator=generator))


def test_a_one_step_generator_at_399(work: Path, tmp_path: Path) -> None:
    result = train(settings(work, "sdxl", tmp_path / "run", generator={"step_indices": [399]}))
    generator = fewstep.load_generator(result, device="cpu")
    assert generator.card.step_indices == (399,)
    assert generator.evaluations() == 1


def test_average_of_a_lora_generator(work: Path, tmp_path: Path) -> None:
    generator = {"step_indices": [999], "ema_half_life_images": 5}
    result = train(settings(work, "sd", tmp_path / "run", generator=generator, memory=MODES["shared_base"]))
    tensors, _ = read_checkpoint(list_checkpoints(tmp_path / "run/checkpoints")[-1])
    names = [name for name in tensors if name.startswith("average.")]
    assert names
    assert any(not torch.equal(tensors[n], tensors[n.replace("average.", "generator.")]) for n in names)
    exported = fewstep.load_generator(result, device="cpu").denoiser
    state = exported.state_dict()
    assert all(torch.equal(state[name.removeprefix("average.")], tensors[name]) for name in names)


def test_continues_from_an_earlier_run(work: Path, tmp_path: Path) -> None:
    no_gan = {"gan_generator_weight": 0.0, "gan_discriminator_weight": 0.0}
    train(settings(work, "sd", tmp_path / "first", losses=no_gan, memory=MODES["shared_base"]))
    second = settings(
        work, "sd", tmp_path / "second", memory=MODES["shared_base"],
        generator={"step_indices": [999], "start_from": str(tmp_path / "first")},
    )  # fmt: skip
    train(second)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"prompts": ""}}, r"data\.prompts is not set"),
        ({"data": {"prompts": "nothing.txt"}}, r"nothing\.txt"),
        ({"data": {"latents": ""}}, r"data\.latents is not set"),
        ({"data": {"latents": "LATENTS-sdxl"}}, "another VAE|another encoder"),
        ({"memory": {"mode": "shared_base", "lora_targets": ["to_quarry"]}}, r"memory\.lora_targets \['to_quarry'\] match no layer"),
        ({"teacher": {"path": "missing"}}, "missing does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(work: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    changes = json.loads(json.dumps(changes).replace("LATENTS", str(work / "latents")))
    with pytest.raises(UserError, match=message):
        train(settings(work, "sd", tmp_path / "run", **changes))
    assert not (tmp_path / "run/checkpoints").exists()


def test_warm_up_then_distillation(work: Path, tmp_path: Path) -> None:
    """Pairs, regression alone, and a run that starts from its generator; the warm-up resumes exactly."""
    run_command("prepare", "pairs", work / "sdxl", tmp_path / "pairs", "--num-pairs", 6, "--teacher-steps", 3,
                "--guidance-scale", 3, "--prompts", work / "prompts.txt", "--device", "cpu")  # fmt: skip
    alone = {
        "distribution_matching_weight": 0.0, "gan_generator_weight": 0.0, "gan_discriminator_weight": 0.0,
        "regression_weight": 1.0,
    }  # fmt: skip
    one_step = {"step_indices": [399]}
    data = {"pairs": str(tmp_path / "pairs"), "prompts": "", "latents": ""}
    many = {"num_steps": 30}
    options: dict[str, Any] = {"losses": alone, "generator": one_step, "data": data}
    train(settings(work, "sdxl", tmp_path / "warm", training=many, **options))
    lines = [json.loads(line) for line in (tmp_path / "warm/metrics.jsonl").read_text().splitlines()]
    losses = [line["regression_loss"] for line in lines if "regression_loss" in line]
    assert sum(losses[-5:]) < sum(losses[:5])
    train(settings(work, "sdxl", tmp_path / "parts", training={"num_steps": 14}, **options))
    train(settings(work, "sdxl", tmp_path / "parts", training=many, **options))
    whole, _ = read_checkpoint(list_checkpoints(tmp_path / "warm/checkpoints")[-1])
    parts, _ = read_checkpoint(list_checkpoints(tmp_path / "parts/checkpoints")[-1])
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not any(name.startswith("fake_score") for name in whole)
    after = {"step_indices": [399], "start_from": str(tmp_path / "warm")}
    train(settings(work, "sdxl", tmp_path / "after", generator=after, training={"num_steps": 1}))
    end, _ = read_checkpoint(list_checkpoints(tmp_path / "after/checkpoints")[-1])
    moved = max((end[n] - whole[n]).abs().max().item() for n in whole if n.startswith("generator."))
    assert moved < 5e-3  # one small step away from the warm-up, not from the teacher


def run_command(*arguments: object) -> None:
    from typer.testing import CliRunner

    from fewstep.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
