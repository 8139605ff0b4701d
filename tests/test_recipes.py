"""The text-to-image recipes are the published rows (METHOD section 5), number by number."""

from pathlib import Path

import pytest

from fewstep.config import TrainSettings, load_settings

RECIPES = Path(__file__).parents[1] / "recipes"

# name: generator lr, fake lr, ratio, batch, GAN generator, GAN discriminator, guidance, steps, step indices, mode, start
PUBLISHED = {
    "sd15_dmd2": (1e-5, 1e-5, 10, 2048, 0, 0, 1.75, 39_000, (999,), "full", ""),
    "sd15_dmd2_gan": (5e-7, 5e-7, 10, 2048, 1e-3, 1e-2, 1.75, 2_000, (999,), "full", "runs/sd15_dmd2"),
    "sdxl_dmd2_4step": (5e-7, 5e-7, 5, 128, 5e-3, 1e-2, 8, 19_000, (999, 749, 499, 249), "full", ""),
    "sdxl_dmd2_4step_lora": (5e-5, 5e-5, 5, 128, 5e-3, 1e-2, 8, 16_000, (999, 749, 499, 249), "lora_generator", ""),
    "sdxl_dmd2_1step": (5e-7, 5e-7, 5, 128, 5e-3, 1e-2, 8, 24_000, (399,), "full", "runs/sdxl_regression_warmup"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    settings = load_settings(TrainSettings, RECIPES / f"{name}.toml")
    found = (
        settings.optimizer.generator_lr, settings.optimizer.fake_score_lr, settings.training.generator_every,
        settings.training.batch_size, settings.losses.gan_generator_weight, settings.losses.gan_discriminator_weight,
        settings.teacher.guidance_scale, settings.training.num_steps, settings.generator.step_indices,
        settings.memory.mode, settings.generator.start_from,
    )  # fmt: skip
    assert found == PUBLISHED[name]
    assert settings.optimizer.warmup_steps == 500
    assert settings.optimizer.betas == (0.9, 0.999)
    assert settings.optimizer.weight_decay == 0.01
    assert settings.optimizer.max_grad_norm == 10
    assert settings.optimizer.decay == "constant"
    assert (settings.losses.min_level_index, settings.losses.max_level_index) == (20, 980)
    assert settings.generator.ema_half_life_images == 0  # the authors keep none
    assert settings.generator.training_inputs == "simulated"


def test_lora_is_the_published_one() -> None:
    memory = load_settings(TrainSettings, RECIPES / "sdxl_dmd2_4step_lora.toml").memory
    assert (memory.lora_rank, memory.lora_alpha, memory.lora_targets) == (64, 8.0, ())


def test_warm_up_is_regression_alone() -> None:
    settings = load_settings(TrainSettings, RECIPES / "sdxl_regression_warmup.toml")
    losses = settings.losses
    assert (losses.distribution_matching_weight, losses.gan_generator_weight, losses.regression_weight) == (0, 0, 1)
    assert losses.regression_distance == "lpips"
    assert (settings.optimizer.generator_lr, settings.training.batch_size, settings.training.num_steps) == (
        1e-5,
        256,
        2000,
    )
    assert settings.generator.step_indices == (399,)


def test_one_gpu_recipe_shares_one_base() -> None:
    settings = load_settings(TrainSettings, RECIPES / "sdxl_dmd2_4step_one_gpu.toml")
    assert settings.memory.mode == "shared_base"
    assert settings.memory.frozen_precision == "bf16"
    assert settings.memory.checkpoint_activations
    assert settings.training.batch_size == 1
