"""The published recipes are the rows of METHOD section 5, number by number."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fewstep
from fewstep.estimate.many import own_settings
from fewstep.families.registry import build_released
from fewstep.settings import PretrainSettings, TrainSettings, load_settings
from fewstep.training.build import schedule_warning

RECIPES = Path(__file__).parents[1] / "recipes"

# name: generator lr, fake lr, ratio, batch, GAN generator, GAN discriminator, guidance, steps, step indices, mode, start
PUBLISHED = {
    "imagenet64_dmd2": (2e-6, 2e-6, 5, 280, 0, 0, 1, 410_000, (999,), "full", ""),
    "imagenet64_dmd2_gan": (2e-6, 2e-6, 5, 280, 3e-3, 1e-2, 1, 200_000, (999,), "full", ""),
    "imagenet64_dmd2_gan_resumed": (5e-7, 5e-7, 5, 280, 3e-3, 1e-2, 1, 140_000, (999,), "full", "runs/imagenet64_dmd2"),
    "imagenet64_dmd": (2e-6, 2e-6, 1, 336, 0, 0, 1, 350_000, (999,), "full", ""),  # its steps are ours
    "sd15_dmd2": (1e-5, 1e-5, 10, 2048, 0, 0, 1.75, 39_000, (999,), "full", ""),
    "sd15_dmd2_gan": (5e-7, 5e-7, 10, 2048, 1e-3, 1e-2, 1.75, 2_000, (999,), "full", "runs/sd15_dmd2"),
    "sdxl_dmd2_4step": (5e-7, 5e-7, 5, 128, 5e-3, 1e-2, 8, 19_000, (999, 749, 499, 249), "full", ""),
    "sdxl_dmd2_4step_lora": (5e-5, 5e-5, 5, 128, 5e-3, 1e-2, 8, 16_000, (999, 749, 499, 249), "lora_generator", ""),
    # the warm-up has no fake score: its rate and ratio are the defaults and never read
    "sdxl_regression_warmup": (1e-5, 2e-6, 5, 256, 0, 0, 8, 2_000, (399,), "full", ""),
    "sdxl_dmd2_1step": (5e-7, 5e-7, 5, 128, 5e-3, 1e-2, 8, 24_000, (399,), "full", "runs/sdxl_regression_warmup"),
}

# name: figures of its row, as they stand in `expected`
RESULTS = {
    "imagenet64_dmd2": ("FID 2.61", "410k steps", "70 h"),
    "imagenet64_dmd2_gan": ("FID 1.51", "200k steps", "53 h"),
    "imagenet64_dmd2_gan_resumed": ("FID 1.28", "+140k steps", "38 h"),
    "imagenet64_dmd": ("FID 2.62",),
    "sd15_dmd2": ("COCO-30k FID 9.28", "39k steps", "25 h"),
    "sd15_dmd2_gan": ("COCO-30k FID 8.35", "+2k steps", "2 h"),
    "sdxl_dmd2_4step": ("COCO-10k FID 19.32", "19k steps", "57 h"),
    "sdxl_dmd2_4step_lora": ("COCO-10k FID 19.68", "16k steps", "63 h"),
    "sdxl_dmd2_1step": ("COCO-10k FID 19.01", "24k steps", "57 h"),
    "sdxl_regression_warmup": ("2k steps",),
}
# name: updates until the rate is whole. DMD's paper says 500 updates; DMD2's runs count 500 in steps of all processes
# together, on 7 GPUs for ImageNet and on 64 for the others.
WARMUP_STEPS = {
    name: 500 if name == "imagenet64_dmd" else round(500 / (7 if name.startswith("imagenet64") else 64))
    for name in PUBLISHED
}
# name: weight and distance of the regression
REGRESSIONS = {"imagenet64_dmd": (0.25, "lpips"), "sdxl_regression_warmup": (1.0, "lpips")}


def test_every_row_has_its_results() -> None:
    assert RESULTS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    settings = load_settings(TrainSettings, RECIPES / f"{name}.toml")
    found = (
        settings.optimizer.generator_lr, settings.optimizer.fake_score_lr, settings.training.generator_every,
        settings.training.batch_size, settings.losses.gan_generator_weight, settings.losses.gan_discriminator_weight,
        settings.teacher.guidance, settings.training.num_steps, settings.generator.step_indices,
        settings.memory.mode, settings.generator.start_from,
    )  # fmt: skip
    assert found == PUBLISHED[name]
    assert settings.optimizer.warmup_steps == WARMUP_STEPS[name]
    assert settings.optimizer.betas == (0.9, 0.999)
    assert settings.optimizer.weight_decay == 0.01
    assert settings.optimizer.max_grad_norm == (0 if name == "sdxl_regression_warmup" else 10)  # 0: not clipped
    assert settings.optimizer.decay == "constant"
    assert (settings.losses.min_level_index, settings.losses.max_level_index) == (20, 980)
    assert settings.generator.ema_half_life_images == 0  # the authors keep none
    assert settings.generator.training_inputs == "simulated"
    losses = settings.losses
    assert (losses.regression_weight, losses.regression_distance) == REGRESSIONS.get(name, (0.0, "pixel"))
    assert losses.distribution_matching_weight == (0.0 if name == "sdxl_regression_warmup" else 1.0)
    assert [figure for figure in RESULTS[name] if figure not in settings.expected] == []
    assert settings.compute.precision == "bf16"


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("imagenet64")])
def test_imagenet_recipes_have_the_released_teacher(name: str) -> None:
    settings = load_settings(TrainSettings, RECIPES / f"{name}.toml")
    assert settings.teacher.path == "teachers/edm-imagenet-64x64-cond-adm.pkl"
    assert settings.teacher.network == "imagenet64-adm"
    assert bool(settings.data.images) == bool(settings.losses.gan_generator_weight)
    assert bool(settings.data.pairs) == (name == "imagenet64_dmd")


def test_lora_is_the_published_one() -> None:
    memory = load_settings(TrainSettings, RECIPES / "sdxl_dmd2_4step_lora.toml").memory
    assert (memory.lora_rank, memory.lora_alpha, memory.lora_targets) == (64, 8.0, ())


def test_warm_up_is_regression_alone() -> None:
    settings = load_settings(TrainSettings, RECIPES / "sdxl_regression_warmup.toml")
    losses = settings.losses
    assert (losses.distribution_matching_weight, losses.gan_generator_weight, losses.regression_weight) == (0, 0, 1)
    assert settings.teacher.guidance == 8  # of the sample pictures here; the pairs bring their own
    head = (RECIPES / "sdxl_regression_warmup.toml").read_text()
    assert "--num-pairs 10000 --guidance-scale 8" in head


def test_one_gpu_recipe_shares_one_base() -> None:
    settings = load_settings(TrainSettings, RECIPES / "sdxl_dmd2_4step_one_gpu.toml")
    assert settings.memory.mode == "shared_base"
    assert settings.memory.base == "bf16"
    assert settings.memory.checkpoint_activations
    assert settings.training.batch_size == 1


def test_z_image_is_ours_and_says_so() -> None:
    """Values have a reason each, no published figure stands beside them, and its steps travel in its pipeline's scheduler."""
    path = RECIPES / "z_image_dmd2_4step_one_gpu.toml"
    settings = load_settings(TrainSettings, path)
    assert settings.expected == "no figure known: ours, for one GPU, not tuned on real weights"
    assert (settings.memory.mode, settings.memory.lora_rank, settings.memory.base) == (
        "shared_base", 64, "bf16",
    )  # fmt: skip
    assert settings.generator.step_indices == (999, 749, 499, 249)
    assert settings.losses.gan_discriminator_weight == settings.losses.gan_generator_weight == 0
    assert settings.teacher.guidance == 5 + 1  # the pipeline's default, which it writes as g = w - 1
    head = path.read_text()
    assert "not tuned on real weights" in head
    assert f"fewstep prepare embeddings {settings.teacher.path} PROMPTS.txt {settings.data.prompts}" in head
    teacher = build_released(settings.teacher.network)
    assert schedule_warning(settings, teacher) == []


def test_klein_is_ours_and_says_so() -> None:
    path = RECIPES / "flux2_klein_dmd2_4step_one_gpu.toml"
    settings = load_settings(TrainSettings, path)
    assert settings.expected == "no figure known: ours, for one GPU, not tuned on real weights"
    assert (settings.memory.mode, settings.memory.lora_rank) == ("shared_base", 64)
    assert settings.teacher.guidance == 4  # the pipeline's default
    head = path.read_text()
    assert "not tuned on real weights" in head
    assert f"fewstep prepare embeddings {settings.teacher.path} PROMPTS.txt {settings.data.prompts}" in head
    assert schedule_warning(settings, build_released(settings.teacher.network)) == []


def test_qwen_image_is_ours_and_says_so() -> None:
    path = RECIPES / "qwen_image_dmd2_4step_one_gpu.toml"
    settings = load_settings(TrainSettings, path)
    assert settings.expected == "no figure known: ours, for one GPU, not tuned on real weights"
    assert (settings.memory.mode, settings.memory.lora_rank, settings.memory.base) == ("shared_base", 64, "nf4")
    assert settings.teacher.guidance == 4  # the pipeline's default
    head = path.read_text()
    assert "not tuned on real weights" in head
    assert f"fewstep prepare embeddings {settings.teacher.path} PROMPTS.txt {settings.data.prompts}" in head
    assert schedule_warning(settings, build_released(settings.teacher.network)) == []


@pytest.mark.parametrize(
    ("name", "processes"), [("z_image_dmd2_4step", 8), ("flux2_klein_dmd2_4step", 8), ("qwen_image_dmd2_4step", 32)]
)
def test_full_networks_for_many_gpus_are_ours_and_say_so(name: str, processes: int) -> None:
    """Teacher, steps and prompts of the recipe for one GPU, nothing offloaded or quantised; the batch divides over its processes."""
    path = RECIPES / f"{name}.toml"
    settings, one = (load_settings(TrainSettings, RECIPES / f"{file}.toml") for file in (name, f"{name}_one_gpu"))
    assert settings.expected.startswith("no figure known: ours, for")
    assert "not tuned on real weights" in settings.expected
    assert (settings.teacher, settings.generator, settings.data) == (one.teacher, one.generator, one.data)
    memory = settings.memory
    assert (memory.mode, memory.base, memory.teacher) == ("full", "bf16", "sharded")
    assert memory.checkpoint_activations
    assert settings.optimizer.fake_score_lr == 1e-5  # at 4e-7 users' fake scores of large bases never followed
    own = own_settings(settings, processes)
    assert own.training.batch_size == 64 // processes
    head = path.read_text()
    assert "not tuned on real weights" in head
    assert f"fewstep prepare embeddings {settings.teacher.path} PROMPTS.txt {settings.data.prompts}" in head


@pytest.mark.parametrize("name", [*PUBLISHED, "sdxl_dmd2_4step_one_gpu"])
def test_each_recipe_says_how_its_warm_up_counts(name: str) -> None:
    """Beside the number, in the recipe or the one it extends."""
    lines = [line for path in _with_parents(name) for line in path.read_text().splitlines()]
    line = next(line for line in lines if line.startswith("warmup_steps"))
    assert re.search(
        r"# (published as 500, counted in steps of all \d+ processes|as the paper counts|one process)", line
    )


def test_one_process_counts_all_of_its_steps() -> None:
    assert load_settings(TrainSettings, RECIPES / "sdxl_dmd2_4step_one_gpu.toml").optimizer.warmup_steps == 500


def _with_parents(name: str) -> list[Path]:
    """A recipe and the ones it extends, nearest first."""
    path = RECIPES / f"{name}.toml"
    parent = tomllib.loads(path.read_text()).get("extends")
    return [path, *(_with_parents(parent.removesuffix(".toml")) if parent else [])]


def test_pairs_of_dmd_have_256_steps() -> None:
    command = "fewstep prepare pairs teachers/edm-imagenet-64x64-cond-adm.pkl data/imagenet64-pairs --teacher-steps 256"
    assert command in (RECIPES / "imagenet64_dmd.toml").read_text()
    assert command in (RECIPES.parent / "docs/imagenet64.md").read_text()


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith(("sd15", "sdxl_dmd2"))])
def test_prompts_and_captions_are_encoded_at_each_step(name: str) -> None:
    """Nothing is stored of 3 million prompts; SDXL's prompts are the captions of its latents."""
    data = load_settings(TrainSettings, RECIPES / f"{name}.toml").data
    assert data.text_embeddings == "computed"
    assert data.truncate_prompts
    assert bool(data.prompts) == name.startswith("sd15")
    assert bool(data.images) == (name != "sd15_dmd2")


@pytest.mark.parametrize("name", ["sd15_dmd2_gan", "sdxl_dmd2_4step"])
def test_latents_are_samples_with_their_captions_as_text(name: str) -> None:
    path = RECIPES / f"{name}.toml"
    settings = load_settings(TrainSettings, path)
    (command,) = [line for line in path.read_text().splitlines() if "fewstep prepare latents" in line]
    assert f"fewstep prepare latents {settings.teacher.path} {settings.data.images} --images" in command
    assert command.endswith("--noise-seed 0 --captions text --truncate-prompts")


def test_one_gpu_frees_the_text_encoders() -> None:
    assert load_settings(TrainSettings, RECIPES / "sdxl_dmd2_4step_one_gpu.toml").data.text_embeddings == "stored"


PRESETS = {"small": (20, 10), "medium": (120, 60)}  # minutes of training: teacher, generator


@pytest.mark.parametrize("size", PRESETS)
def test_presets_for_own_pictures_end_by_the_clock(size: str) -> None:
    teacher = load_settings(PretrainSettings, RECIPES / f"my_pictures_{size}.toml")
    generator = load_settings(TrainSettings, RECIPES / f"my_pictures_{size}_dmd2.toml")
    assert (teacher.training.time_limit_minutes, generator.training.time_limit_minutes) == PRESETS[size]
    assert generator.teacher.path == teacher.run.folder
    for settings in (teacher, generator):
        assert settings.training.num_steps == 1_000_000
        assert settings.optimizer.final_lr_fraction == 0  # the rate falls with the clock


@pytest.mark.parametrize(
    ("size", "classes"),
    [("small", 0), pytest.param("small", 2, marks=pytest.mark.long), pytest.param("medium", 2, marks=pytest.mark.long)],
)
def test_presets_train_with_and_without_classes(
    size: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Colour pictures in folders, or loose ones."""
    monkeypatch.setattr("fewstep.training.own_features._SHOWN", 256)
    for number in range(4):
        place = tmp_path / "pictures" / (f"class{number % classes}" if classes else "")
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    short = {
        "data__images": str(tmp_path / "pictures"), "training__time_limit_minutes": 1e-6, "training__batch_size": 2,
        "run__sample_images": 1, "compute__device": "cpu", "compute__precision": "fp32",
    }  # fmt: skip
    teacher, generator = (str(tmp_path / name) for name in ("teacher", "generator"))
    fewstep.pretrain(RECIPES / f"my_pictures_{size}.toml", run__folder=teacher, network__name="tiny", **short)
    run = fewstep.train(
        RECIPES / f"my_pictures_{size}_dmd2.toml", run__folder=generator, teacher__path=teacher, **short
    )
    assert run.generator.denoiser.num_classes == classes
    assert run.generator.sample(num_images=1, output="tensor").shape[1:] == (
        (3, 32, 32) if size == "small" else (3, 64, 64)
    )
