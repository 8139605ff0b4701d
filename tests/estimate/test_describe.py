"""A dry run says what a recipe would need, from shapes alone: no teacher, no pictures, no files."""

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.schedules import StepSchedule
from fewstep.distillation.inputs import FreshInputs, NoisedDataInputs, RealBatch
from fewstep.errors import UserError
from fewstep.estimate import describe as estimate
from fewstep.estimate.describe import describe_distillation, network_size
from fewstep.estimate.memory import (
    FAKE_SCORE_TURN,
    FROZEN,
    GENERATOR_TURN,
    GRADIENTS,
    PICTURES,
    STATES,
    TRAINED,
    Estimate,
    estimate_run,
)
from fewstep.estimate.meter import ACTIVATIONS
from fewstep.estimate.stand_ins import conditions_of
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.families.edm.shapes import build_network_config
from fewstep.families.edm.unet import EDMUNetConfig
from fewstep.families.registry import all_families, build_released
from fewstep.settings import PretrainSettings, TrainSettings, load_settings, parse_settings
from fewstep.training.step import micro_batches
from tests.cli.test_main import PRETRAIN_RECIPE, fewstep
from tests.conftest import tiny_denoiser
from tests.tiny_models import tiny_sdxl_folder

RECIPES = Path(__file__).parents[2] / "recipes"
IMAGENET = sorted(path.name for path in RECIPES.glob("imagenet64_*.toml"))


@pytest.fixture
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without teachers, pictures or runs; the test fails if something is left in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gib_in(lines: list[str], start: str) -> float:
    (line,) = [line for line in lines if line.startswith(start)]
    found = re.search(r"([0-9.]+) GiB", line)
    assert found
    return float(found[1])


@pytest.mark.parametrize(
    "name",
    [name if name == "imagenet64_dmd2_gan.toml" else pytest.param(name, marks=pytest.mark.long) for name in IMAGENET],
)
def test_dry_run_of_the_published_recipes(empty_place: Path, name: str) -> None:
    answer = fewstep("train", RECIPES / name, "--dry-run")
    assert answer.code == 0
    first, *others = answer.err.splitlines()
    assert first == "rehearsing a step and its sample pictures with memory.mode=full ..."
    assert all(line.endswith(" ...") for line in others)
    settings = load_settings(TrainSettings, RECIPES / name)
    assert f"optimizer.lr = {list(settings.optimizer.lr)!r}\n" in answer.out
    assert f"training.batch_size = {settings.training.batch_size}\n" in answer.out
    assert f"run.folder = 'runs/{Path(name).stem}'\n" in answer.out
    assert "network: 295.9 M parameters, 64x64x3, 1000 classes" in answer.out
    assert ("; discriminator: " in answer.out) == (settings.losses.gan_discriminator_weight > 0)
    assert f"published: {settings.expected}" in answer.out
    assert "published: ImageNet-64 FID" in answer.out
    assert gib_in(answer.out.splitlines(), "estimated peak") > 10
    fits = re.search(r"that fits: (\d+) in 24 GiB, (\d+) in 40 GiB, (\d+) in 80 GiB", answer.out)
    assert fits
    assert 8 < int(fits[1]) < int(fits[2]) < int(fits[3]) < settings.training.batch_size
    assert os.listdir(empty_place) == []


def test_there_is_a_recipe_for_each_published_row() -> None:
    assert IMAGENET == [
        "imagenet64_dmd.toml", "imagenet64_dmd2.toml", "imagenet64_dmd2_gan.toml", "imagenet64_dmd2_gan_resumed.toml",
    ]  # fmt: skip


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[TrainSettings]:
    """The settings that steps were rehearsed with; no step is."""
    asked: list[TrainSettings] = []

    def answer(settings: TrainSettings, *_: object, pictures: bool = True, **__: object) -> Estimate:
        asked.append(settings)
        kinds = Counter({FROZEN: 2**30, ACTIVATIONS: 2**30})
        peaks = {GENERATOR_TURN: 2**31, FAKE_SCORE_TURN: 2**30} | ({PICTURES: 2**30} if pictures else {})
        return Estimate(peaks, {GENERATOR_TURN: kinds}, {GENERATOR_TURN: 10**12}, 10**10, {"teacher": 2_000_000})

    monkeypatch.setattr(estimate, "estimate_run", answer)
    return asked


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("*.toml")))
def test_dry_run_of_every_recipe(empty_place: Path, rehearsed: list[TrainSettings], name: str) -> None:
    """All but the rehearsal: settings, networks by name or from a bundled folder, step schedule, what was published."""
    try:
        trains_a_teacher = bool(load_settings(PretrainSettings, RECIPES / name).network)
    except UserError:  # it is one of the other command
        trains_a_teacher = False
    answer = fewstep("pretrain" if trains_a_teacher else "train", RECIPES / name, "--dry-run")
    assert answer.code == 0, answer.err
    assert "run.folder = 'runs/" in answer.out
    assert "warning: " not in answer.out
    if trains_a_teacher:
        assert "estimated peak: " in answer.out
        return
    settings = load_settings(TrainSettings, RECIPES / name)
    is_text = (
        any(settings.teacher.network in family.shapes for family in all_families() if family.takes == "prompts")
        or "emoji" in name
    )
    is_known = bool(settings.teacher.network) or settings.teacher.path.startswith("bundled:")
    every_mode = is_known and is_text and settings.losses.distribution_matching_weight > 0
    assert ("memory: unknown" in answer.out) == (not is_known)
    size = settings.training.batch_size
    own = settings.training.microbatch_size or size
    modes = [asked.memory.mode for asked in rehearsed if (asked.training.microbatch_size or size) == own]
    assert len(rehearsed) == len(modes) + is_known * len(
        {1, size} - {own}
    )  # one sample and the whole batch, for what fits
    assert modes[:1] == [settings.memory.mode] * is_known
    assert sorted(modes) == sorted(["full", "lora_generator", "shared_base"] if every_mode else modes[:1])
    assert answer.err.count("\n") == len(modes)
    assert all(f"memory.mode={mode} ..." in answer.err for mode in modes)
    assert answer.out.count("with memory.mode=") == 3 * every_mode
    assert (f"published: {settings.expected}" in answer.out) == (is_known and bool(settings.expected))


def test_a_dry_run_speaks_at_once(empty_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings, and what is being rehearsed, are out before any rehearsal has ended; then a line a mode."""

    def stop(*_: object, **__: object) -> Estimate:
        raise UserError("stopped here")

    monkeypatch.setattr(estimate, "estimate_run", stop)
    answer = fewstep("train", RECIPES / "sdxl_dmd2_4step_one_gpu.toml", "--dry-run")
    assert answer.code == 2
    assert "teacher.network = 'sdxl'\n" in answer.out
    assert answer.err == (
        "rehearsing a step and its sample pictures with memory.mode=shared_base ...\nfewstep: stopped here\n"
    )


def test_what_offloaded_blocks_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per step a fifth of the generator's turn, the fake score's, and 0.8 + 1.5 draws of two micro-batches: 8 + 20 + 46 GB."""
    gigabyte = 10**9
    rehearsed = Estimate(
        dict.fromkeys((GENERATOR_TURN, FAKE_SCORE_TURN, PICTURES), 2**33), {GENERATOR_TURN: Counter(), FAKE_SCORE_TURN: Counter()},
        {GENERATOR_TURN: 5 * 10**12, FAKE_SCORE_TURN: 10**12}, 10**11, {"teacher": 2_000_000, "generator": 2_000_000},
        {GENERATOR_TURN: 40 * gigabyte, FAKE_SCORE_TURN: 20 * gigabyte}, 10 * gigabyte,
    )  # fmt: skip
    asked = list[TrainSettings]()
    monkeypatch.setattr(estimate, "estimate_run", lambda settings, *_, **__: asked.append(settings) or rehearsed)
    values = {
        "teacher": {"network": "sd15"}, "generator": {"step_indices": [999, 749, 499, 249]},
        "memory": {"mode": "shared_base", "base": "nf4", "teacher": "offloaded_blocks", "checkpoint_activations": True},
        "training": {"batch_size": 4, "microbatch_size": 2},
    }  # fmt: skip
    lines = list(describe_distillation(parse_settings(TrainSettings, values, "test")))
    told = (
        "memory.teacher='offloaded_blocks': 9.3 GiB of the base stay in host memory, and 74 GB a step on average go to the GPU, 3 s at 25 GB/s (PCIe "
        "4.0 with 16 lanes, not measured), in which it does not compute"
    )
    assert told in lines
    assert (
        lines[-3] == "with memory.mode=full: 8.0 GiB a step, three networks (memory.base=bf16)"
    )  # which LoRAs alone allow
    (full,) = [settings.memory for settings in asked if settings.memory.mode == "full"]
    assert (full.base, full.teacher) == ("bf16", "sharded")


def test_each_mode_is_told_as_it_is_finished(rehearsed: list[TrainSettings]) -> None:
    lines = describe_distillation(load_settings(TrainSettings, RECIPES / "sd15_dmd2.toml"))
    for line in lines:
        if line.startswith("with memory.mode=lora_generator"):
            break
    assert [asked.memory.mode for asked in rehearsed] == ["full", "full", "lora_generator"]  # one sample, for what fits


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["sd15_dmd2_gan.toml", "sdxl_dmd2_4step_one_gpu.toml", "z_image_dmd2_4step_one_gpu.toml"]
)
def test_whole_dry_run_of_a_text_recipe(empty_place: Path, name: str) -> None:
    """Nothing left out. On one GPU SDXL with GAN and Z-Image without fit 24 GiB, with the VAE's weights and eight pictures at 1024x1024."""
    answer = fewstep("train", RECIPES / name, "--dry-run", "training.batch_size=1")
    assert answer.code == 0
    lines = answer.out.splitlines()
    settings = load_settings(TrainSettings, RECIPES / name)
    peaks = {mode: gib_in(lines, f"with memory.mode={mode}") for mode in ("full", "lora_generator", "shared_base")}
    assert peaks["full"] > peaks["lora_generator"] > peaks["shared_base"] > 4
    assert gib_in(lines, "estimated peak") == peaks[settings.memory.mode]
    assert answer.err.count("rehearsing") == 3
    if "one_gpu" in name:
        has_gan, room = (
            "sdxl" in name,
            6 if "sdxl" in name else 4,
        )  # for what is not counted: workspaces, CUDA context
        assert (settings.memory.mode, settings.run.sample_images, settings.losses.gan_discriminator_weight > 0) == (
            "shared_base", 8, has_gan,
        )  # fmt: skip
        assert 10 < peaks["shared_base"] < 24 - room, answer.out


def test_overrides_reach_the_dry_run(empty_place: Path, rehearsed: list[TrainSettings]) -> None:
    name = RECIPES / "imagenet64_dmd2.toml"
    out = fewstep("train", name, "--dry-run", "training.batch_size=28", "run.folder=elsewhere").out.splitlines()
    assert "training.batch_size = 28" in out
    assert "run.folder = 'elsewhere'" in out
    assert [asked.training.batch_size for asked in rehearsed] == [28, 28]
    assert [asked.training.microbatch_size for asked in rehearsed] == [0, 1]


def test_dry_run_of_pretraining(empty_place: Path) -> None:
    Path("mine.toml").write_text(PRETRAIN_RECIPE)
    answer = fewstep("pretrain", "mine.toml", "--dry-run")
    assert answer.code == 0
    assert "network.name = 'tiny'" in answer.out
    assert "network: 0.2 M parameters" in answer.out
    assert os.listdir(empty_place) == ["mine.toml"]


def test_dry_run_of_an_impossible_network(empty_place: Path) -> None:
    Path("mine.toml").write_text(PRETRAIN_RECIPE)
    answer = fewstep("pretrain", "mine.toml", "--dry-run", "network.img_resolution=18")
    assert answer.code == 2
    assert "network.img_resolution=18 must be a multiple of 4" in answer.err


def test_shape_is_read_from_a_teacher_at_hand(teacher_folder: Path) -> None:
    settings = parse_settings(TrainSettings, {"teacher": {"path": str(teacher_folder)}}, "test")
    lines = list(describe_distillation(settings))
    assert lines[0].endswith("M parameters, 16x16x1, 4 classes")


def test_without_teacher_or_shape_the_memory_is_unknown() -> None:
    (line,) = describe_distillation(TrainSettings())
    assert line == "memory: unknown; set teacher.path to a model folder, or teacher.network, to estimate it"


def test_a_teacher_that_is_not_there_yet_is_named() -> None:
    """It said to set a path where one was set."""
    settings = parse_settings(TrainSettings, {"teacher": {"path": "runs/my_pictures_small"}}, "test")
    (line,) = describe_distillation(settings)
    assert line.startswith(
        "memory: unknown; teacher.path=runs/my_pictures_small is no folder here yet: train, convert or"
    )


# --- The counts


def tiny_config(resolution: int = 16) -> EDMUNetConfig:
    """The tiny network, with attention at its bottleneck only."""
    config = build_network_config("tiny", img_resolution=resolution, img_channels=1, label_dim=4)
    return replace(config, attn_resolutions=())


def tiny_description(resolution: int = 16) -> dict[str, Any]:
    return EDMDenoiser(tiny_config(resolution)).describe()


def test_meta_count_equals_the_real_parameters() -> None:
    real = EDMDenoiser(tiny_config())
    size = network_size(tiny_description())
    assert size.parameters == sum(parameter.numel() for parameter in real.parameters())


def test_released_imagenet_network_has_its_published_size() -> None:
    denoiser = build_released("imagenet64-adm")
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == pytest.approx(295.9e6, abs=0.05e6)


def real_saved_bytes(denoiser: EDMDenoiser, size: int) -> int:
    """Bytes autograd holds after a real forward on the CPU, parameters not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in denoiser.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    noisy = torch.randn(size, *denoiser.image_shape)
    labels = Condition.from_labels(torch.arange(size) % 4, 4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        denoiser(noisy, torch.ones(size), labels)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def test_activations_are_those_of_a_real_forward() -> None:
    """The growth from 4 to 8 samples, so that nothing of fixed size counts; attention's workspace may differ."""
    denoiser = EDMDenoiser(tiny_config())
    size = network_size(tiny_description())
    grown = (real_saved_bytes(denoiser, 8) - real_saved_bytes(denoiser, 4)) / 4
    assert size.activation_bytes == pytest.approx(grown, rel=0.05)


def test_activations_scale_with_the_picture() -> None:
    small, large = network_size(tiny_description(16)), network_size(tiny_description(32))
    assert small.parameters == large.parameters
    assert large.activation_bytes == pytest.approx(4 * small.activation_bytes, rel=0.05)
    assert small.activation_bytes > 16 * 16 * 4 * 10


def test_lines_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident kinds, what a step adds, their sum, and pictures where they need more; the counts: test_memory.py."""
    gib = 2**30
    kinds = Counter({FROZEN: 3 * gib, TRAINED: 2 * gib, STATES: 4 * gib, GRADIENTS: gib, ACTIVATIONS: 5 * gib})
    rehearsed = Estimate(
        {GENERATOR_TURN: 15 * gib, FAKE_SCORE_TURN: 9 * gib, PICTURES: 16 * gib}, {GENERATOR_TURN: kinds},
        {GENERATOR_TURN: 5 * 10**12, FAKE_SCORE_TURN: 10**12}, 10**11, {"teacher": 2_000_000, "generator": 2_000_000, "discriminator": 500_000},
    )  # fmt: skip
    monkeypatch.setattr(estimate, "estimate_run", lambda *_, **__: rehearsed)
    values = {"teacher": {"network": "cifar10-ddpmpp"}, "training": {"batch_size": 8}}
    lines = list(describe_distillation(parse_settings(TrainSettings, values, "test")))
    assert lines == [
        "network: 2.0 M parameters, 32x32x3, 10 classes; discriminator: 0.5 M",
        "memory for weights, averages and optimiser states: 9.0 GiB (frozen 3.0, trained 2.0, optimiser states 4.0)",
        "memory for gradients and activations at batch 8 (bf16, one process): 6.0 GiB in the generator's turn",
        "estimated peak: 15.0 GiB (a rehearsed step on shapes alone; workspace of the kernels comes on top)",
        "sample pictures need more: 16.0 GiB with run.samples=[1000, 64]",
        "training.microbatch_size that fits: 8 (the whole batch) in 24 GiB, 8 (the whole batch) in 40 GiB, 8 (the whole batch) "
        "in 80 GiB (a tenth of the card left free)",
        "work: 2.64 TFLOP a step on average; 100,000 steps take 0.4 hours at 200 TFLOP/s (a fifth of what an H100 can do "
        "in bf16)",
    ]


@pytest.mark.parametrize("mode", [pytest.param("full", marks=pytest.mark.long), "shared_base"])
def test_every_memory_mode_of_a_text_model(tmp_path: Path, mode: str) -> None:
    """From its folder's configs alone; the chosen mode's peak is that of its line."""
    folder = tiny_sdxl_folder(tmp_path / "sdxl")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    values = {
        "teacher": {"path": str(folder)}, "memory": {"mode": mode}, "run": {"sample_images": 1},
        "training": {"batch_size": 64}, "compute": {"precision": "fp32"},
    }  # fmt: skip
    lines = list(describe_distillation(parse_settings(TrainSettings, values, "test")))
    assert "8x8x4 latents" in lines[0]
    assert ("generator's LoRA" in lines[0]) == (mode == "shared_base")
    assert [line.split(":")[0] for line in lines if line.startswith("with ")] == [
        "with memory.mode=full", "with memory.mode=lora_generator", "with memory.mode=shared_base",
    ]  # fmt: skip
    assert gib_in(lines, "estimated peak") == gib_in(lines, f"with memory.mode={mode}")


def test_dry_run_of_a_warm_up() -> None:
    """Regression alone: one trained network beside the teacher; neither pairs nor a fake score."""
    values = {
        "teacher": {"network": "cifar10-ddpmpp"}, "training": {"batch_size": 2}, "compute": {"precision": "fp32"},
        "losses": {"distribution_matching_weight": 0.0, "regression_weight": 1.0}, "run": {"sample_images": 1},
    }  # fmt: skip
    lines = list(describe_distillation(parse_settings(TrainSettings, values, "test")))
    weights = 55.7e6 * 4 / 2**30
    assert gib_in(lines, "memory for weights") == pytest.approx(4 * weights, abs=0.1)


def test_counting_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter of the counted network lies on the meta device."""
    seen: list[torch.device] = []
    original = estimate._saved_bytes

    def watch(denoiser: nn.Module) -> int:
        seen.extend(parameter.device for parameter in denoiser.parameters())
        return original(denoiser)  # type: ignore[arg-type]

    monkeypatch.setattr(estimate, "_saved_bytes", watch)
    network_size(tiny_description())
    assert seen
    assert {device.type for device in seen} == {"meta"}


@pytest.mark.parametrize("inputs", ["simulated", "simulated_per_sample", "noised_data"])
@pytest.mark.parametrize("microbatch", [0, 3])
def test_drawn_forwards_are_those_of_real_steps(inputs: str, microbatch: int) -> None:
    """Over many steps: samples that go through the generator for its inputs, and how often all its weights are read for them."""
    network, every = tiny_denoiser(), 2
    settings = parse_settings(
        TrainSettings,
        {
            "teacher": {"path": "teacher"},
            "generator": {"step_indices": [900, 600, 300], "training_inputs": inputs},
            "training": {"generator_every": every, "batch_size": 6},
            "losses": {"gan_weights": [1e-2, 3e-2]},
        },
        "test",
    )
    conditions, steps = conditions_of(network), StepSchedule((900, 600, 300))
    make = (
        NoisedDataInputs(steps) if inputs == "noised_data" else FreshInputs(steps, conditions, "per_sample" in inputs)
    )
    real = RealBatch(torch.zeros(6, *network.image_shape), conditions.rows(torch.zeros(6, dtype=torch.int64)))
    count = 60
    with mock.patch.object(network, "denoise", side_effect=lambda noisy, *_: torch.zeros_like(noisy)) as denoise:
        for step in range(count):
            for part in micro_batches(Draws.of_batch(0, step, 6), real, microbatch):
                make(network, part.draws, part.real)
    forwards = denoise.call_count / (2 if microbatch else 1)
    samples = sum(len(call.args[0]) for call in denoise.call_args_list) / 6
    drawn = 1 - 1 / every  # samples without gradient on the other turns
    assert estimate._drawn_forwards(settings, every, 0.5) == pytest.approx(drawn + samples / count, abs=0.25)
    assert estimate._drawn_forwards(settings, every, 1.0) == pytest.approx(drawn + forwards / count, abs=0.25)


@pytest.mark.parametrize("inputs", ["simulated", "simulated_per_sample"])
def test_a_rehearsed_turn_has_no_earlier_steps(inputs: str) -> None:
    """They are counted by `_drawn_forwards`; twice would make them dearer than they are."""
    found = []
    for steps in ([900], [900, 600, 300]):
        settings = parse_settings(
            TrainSettings,
            {
                "teacher": {"path": "teacher"},
                "generator": {"step_indices": steps, "training_inputs": inputs},
                "training": {"batch_size": 6},
            },
            "test",
        )
        found.append(estimate_run(settings, tiny_denoiser().to("meta"), gpu=False, pictures=False).flops)
    assert found[0] == found[1]
