"""From settings to networks, terms and inputs; and runs that start from earlier ones or from stored pairs."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.draws import Draws
from fewstep.distillation.inputs import FreshAndPairedInputs, FreshInputs, RealBatch
from fewstep.distillation.roles import Roles, build_roles
from fewstep.distillation.terms import (
    DiscriminatorAdversarial,
    DistributionMatching,
    FakeScoreDenoising,
    GeneratorAdversarial,
    Regression,
)
from fewstep.errors import UserError
from fewstep.estimate.many import own_settings
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.families.edm.shapes import build_network_config
from fewstep.families.registry import build_released
from fewstep.formats.model_folder import ModelCard, write_model_folder
from fewstep.models.load import load_generator, load_teacher
from fewstep.models.model import Model, build_model
from fewstep.networks.perceptual import pixel_distance
from fewstep.preparation.pairs import prepare_pairs
from fewstep.settings import TrainSettings, parse_settings
from fewstep.training.build import (
    build_distillation,
    build_step_schedule,
    check_network,
    open_teacher,
    schedule_warning,
    start_roles,
)
from fewstep.training.checkpoint import list_checkpoints, read_checkpoint
from fewstep.training.inputs import build_real_data, check_pairs
from fewstep.training.run import train
from fewstep.training.step import two_time_scale_step
from tests.conftest import relative_error, tiny_denoiser, write_pictures
from tests.training.helpers import tiny_train_settings

NO_GAN = {"gan_generator_weight": 0.0, "gan_discriminator_weight": 0.0}


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Model:
    return load_teacher(teacher_folder, device="cpu")


@pytest.fixture(scope="module")
def pairs_folder(teacher: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "pairs"
    return prepare_pairs(teacher, "teacher", folder, num_pairs=6, seed=11, num_steps=3, shard_size=4)


@pytest.fixture(scope="module")
def earlier_run(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps with GAN, so that generator, fake score and head have all moved."""
    pictures = write_pictures(tmp_path_factory.mktemp("pictures"))
    folder = tmp_path_factory.mktemp("runs") / "earlier"
    train(tiny_train_settings(teacher_folder, pictures, folder, training={"num_steps": 2, "generator_every": 1}))
    return folder


def settings_of(**sections: dict[str, Any]) -> TrainSettings:
    return parse_settings(TrainSettings, sections, "test")


def assert_same_weights(module: nn.Module, tensors: dict[str, Tensor], name: str = "") -> None:
    own = {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}
    assert own.keys() == module.state_dict().keys()
    for key, value in module.state_dict().items():
        assert torch.equal(value, own[key]), key


def differ(a: nn.Module, b: nn.Module) -> bool:
    return any(not torch.equal(a.state_dict()[key], value) for key, value in b.state_dict().items())


# --- Terms and inputs


@pytest.mark.parametrize(
    ("losses", "generator_terms", "fake_score_terms"),
    [
        ({}, [DistributionMatching], [FakeScoreDenoising]),
        ({"gan_generator_weight": 3e-3, "gan_discriminator_weight": 1e-2},
         [DistributionMatching, GeneratorAdversarial], [FakeScoreDenoising, DiscriminatorAdversarial]),
        ({"gan_discriminator_weight": 1e-2}, [DistributionMatching], [FakeScoreDenoising, DiscriminatorAdversarial]),
        ({"distribution_matching_weight": 0.0, "gan_generator_weight": 1.0, "gan_discriminator_weight": 1.0},
         [GeneratorAdversarial], [FakeScoreDenoising, DiscriminatorAdversarial]),
    ],
)  # fmt: skip
def test_weights_choose_the_terms(
    teacher: Model, losses: dict[str, float], generator_terms: list[type], fake_score_terms: list[type]
) -> None:
    run = build_distillation(settings_of(losses=losses), teacher, teacher.conditioner.every)
    assert [type(term) for term in run.generator_terms] == generator_terms
    assert [type(term) for term in run.fake_score_terms] == fake_score_terms
    assert (run.roles.discriminator is not None) == (losses.get("gan_discriminator_weight", 0) > 0)
    assert isinstance(run.inputs, FreshInputs)


def test_settings_reach_the_terms_and_optimisers(teacher: Model, pairs_folder: Path) -> None:
    run = build_distillation(
        settings_of(
            teacher={"guidance_scale": 1.5},
            data={"pairs": str(pairs_folder)},
            losses={
                "distribution_matching_weight": 0.7, "level_indices": [5, 900, 2.0],
                "gan_generator_weight": 0.2, "gan_discriminator_weight": 0.3, "regression_weight": 0.25,
                "gan_levels": 300,
            },
            optimizer={"generator_lr": 1e-4, "fake_score_lr": 3e-4, "max_grad_norm": 2.0, "betas": [0.5, 0.6]},
            training={"generator_every": 7},
        ),
        teacher,
        teacher.conditioner.every,
    )  # fmt: skip
    matching, adversarial, regression = run.generator_terms
    assert isinstance(matching, DistributionMatching)
    assert isinstance(regression, Regression)
    assert (matching.weight, adversarial.weight, regression.weight) == (0.7, 0.2, 0.25)
    assert (matching.guidance_scale, matching.min_index, matching.max_index, matching.level_shift) == (1.5, 5, 900, 2)
    assert (matching.teacher, matching.fake_score) == (run.roles.teacher, run.roles.fake_score)
    assert regression.distance is pixel_distance
    assert [term.weight for term in run.fake_score_terms] == [1.0, 0.3]
    assert isinstance(adversarial, GeneratorAdversarial)
    assert isinstance(run.fake_score_terms[1], DiscriminatorAdversarial)
    assert (adversarial.max_index, run.fake_score_terms[1].max_index) == (300, 300)
    assert (run.generator_every, run.microbatch_size) == (7, 0)
    assert isinstance(run.inputs, FreshAndPairedInputs)
    assert len(run.inputs.paired.pairs) == 6
    for update, lr, modules in (
        (run.generator_update, 1e-4, [run.roles.generator]),
        (run.fake_score_update, 3e-4, [run.roles.fake_score, run.roles.discriminator]),
    ):
        (group,) = update.optimizer.param_groups
        assert update.max_grad_norm == 2.0
        assert (group["lr"], group["betas"]) == (lr, (0.5, 0.6))
        expected = [id(parameter) for parameter in nn.ModuleList(modules).parameters()]
        assert [id(parameter) for parameter in group["params"]] == expected


def test_a_norm_limit_that_the_teacher_cannot_keep_is_refused(teacher: Model) -> None:
    """An EDM network guides its x0, whose norm says nothing of burnt colours."""
    with pytest.raises(
        UserError, match=r"guidance_scale=\[..., 1\]: the norm .* is limited for text-to-image models; of EDM"
    ):
        build_distillation(settings_of(teacher={"guidance_scale": [1.5, 1.0]}), teacher, teacher.conditioner.every)


def test_roles_start_as_copies_of_the_teacher(teacher: Model) -> None:
    roles = build_distillation(settings_of(), teacher, teacher.conditioner.every).roles
    assert roles.teacher is teacher.denoiser
    for network in (roles.generator, roles.fake_score):
        assert_same_weights(network, teacher.denoiser.state_dict())
        assert all(parameter.requires_grad for parameter in network.parameters())
        assert not network.training  # distillation has no dropout
    storages = {
        p.data_ptr() for network in (roles.teacher, roles.generator, roles.fake_score) for p in network.parameters()
    }
    assert len(storages) == 3 * len(list(teacher.denoiser.parameters()))
    assert not any(parameter.requires_grad for parameter in roles.teacher.parameters())


def test_head_start_follows_the_seed(teacher: Model) -> None:
    gan = {"gan_discriminator_weight": 1e-2}
    heads = [
        build_distillation(
            settings_of(losses=gan, training={"seed": seed}), teacher, teacher.conditioner.every
        ).roles.discriminator
        for seed in (1, 1, 2)
    ]
    assert not differ(heads[0], heads[1])  # type: ignore[arg-type]
    assert differ(heads[0], heads[2])  # type: ignore[arg-type]


def test_pictures_are_read_only_where_a_term_needs_them(teacher: Model) -> None:
    """Without GAN no pictures are needed at all."""
    assert build_real_data(settings_of(), teacher) is None
    with pytest.raises(UserError, match=r"data\.images is not set"):
        build_real_data(settings_of(losses={"gan_discriminator_weight": 1e-2}), teacher)


def test_a_class_conditional_export_carries_any_steps(teacher: Model) -> None:
    assert schedule_warning(settings_of(generator={"step_indices": [999, 666, 333]}), teacher.denoiser) == []


def test_step_indices_travel_with_the_run(teacher: Model) -> None:
    settings = settings_of(generator={"step_indices": [999, 749, 499, 249]})
    assert build_step_schedule(settings, teacher.denoiser).indices == (999, 749, 499, 249)
    inputs = build_distillation(settings, teacher, teacher.conditioner.every).inputs
    assert isinstance(inputs, FreshInputs)
    assert inputs.steps.indices == (999, 749, 499, 249)


# --- Starting from an earlier run


def roles_like(teacher: Model, with_discriminator: bool = True) -> Roles:
    torch.manual_seed(99)
    return build_roles(teacher.denoiser, with_discriminator)


def test_start_from_a_run_folder(teacher: Model, earlier_run: Path) -> None:
    roles = roles_like(teacher)
    start_roles(roles, earlier_run)
    tensors, _ = read_checkpoint(list_checkpoints(earlier_run / "checkpoints")[-1])
    assert roles.discriminator is not None
    assert_same_weights(roles.generator, tensors, "generator.")
    assert_same_weights(roles.fake_score, tensors, "fake_score.")
    assert_same_weights(roles.discriminator, tensors, "discriminator.")
    assert differ(roles.generator, teacher.denoiser)
    assert differ(roles.fake_score, teacher.denoiser)
    assert_same_weights(roles.teacher, load_teacher_weights(teacher))


def load_teacher_weights(teacher: Model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in teacher.denoiser.state_dict().items()}


@pytest.mark.parametrize("depths", [[0.25], [0.7], [0.5, 1.0]])
def test_start_from_a_run_of_other_taps(teacher_folder: Path, earlier_run: Path, depths: list[float]) -> None:
    """0.7 is a feature of the same shape, for which the earlier head was not trained."""
    teacher = load_teacher(teacher_folder, device="cpu")
    assert teacher.denoiser.tap_shapes[teacher.denoiser.places_at([0.7])[0]] == teacher.denoiser.feature_shapes[0]
    teacher.denoiser.tap_at(depths)
    roles = roles_like(teacher)
    with pytest.raises(
        UserError, match=r"losses\.gan_taps was \[0\.5\] in that run and is other depths here: set it back, or start"
    ):
        start_roles(roles, earlier_run)
    start_roles(roles, earlier_run / "generator")


def test_start_without_head_from_a_run_with_one(teacher: Model, earlier_run: Path) -> None:
    roles = roles_like(teacher, with_discriminator=False)
    start_roles(roles, earlier_run)
    assert roles.discriminator is None
    assert differ(roles.generator, teacher.denoiser)


def test_start_with_gan_from_a_run_without(teacher_folder: Path, teacher: Model, tmp_path: Path) -> None:
    """The published second phase: the GAN joins a run that had none, its head starts at random."""
    settings = tiny_train_settings(
        teacher_folder, tmp_path, tmp_path / "first", losses=NO_GAN, data={"images": ""},
        training={"num_steps": 1, "generator_every": 1},
    )  # fmt: skip
    train(settings)
    roles, untouched = roles_like(teacher), roles_like(teacher)
    start_roles(roles, tmp_path / "first")
    assert differ(roles.generator, teacher.denoiser)
    assert differ(roles.fake_score, teacher.denoiser)
    assert roles.discriminator is not None
    assert untouched.discriminator is not None
    assert not differ(roles.discriminator, untouched.discriminator)


def test_start_from_an_exported_generator(teacher: Model, earlier_run: Path) -> None:
    """Only the generator is there; the fake score starts as the teacher."""
    roles = roles_like(teacher)
    start_roles(roles, earlier_run / "generator")
    exported = load_generator(earlier_run / "generator", device="cpu").denoiser
    assert_same_weights(roles.generator, exported.state_dict())
    assert not differ(roles.fake_score, teacher.denoiser)
    assert all(parameter.requires_grad for parameter in roles.generator.parameters())


def test_a_run_starts_from_the_one_before(
    teacher_folder: Path, pictures: Path, tmp_path: Path, earlier_run: Path
) -> None:
    """Through the settings: one step at a rate of almost nothing leaves the earlier weights in place."""
    settings = tiny_train_settings(
        teacher_folder, pictures, tmp_path / "second", generator={"start_from": str(earlier_run)},
        optimizer={"generator_lr": 1e-12, "fake_score_lr": 1e-12}, training={"num_steps": 1},
    )  # fmt: skip
    train(settings)
    earlier, _ = read_checkpoint(list_checkpoints(earlier_run / "checkpoints")[-1])
    now, _ = read_checkpoint(list_checkpoints(tmp_path / "second/checkpoints")[-1])
    for name in earlier:
        if name.startswith(("generator.", "fake_score.", "discriminator.")):
            assert torch.allclose(now[name], earlier[name], atol=1e-9), name


def test_start_from_another_network(teacher: Model, tmp_path: Path) -> None:
    narrow = tiny_denoiser(num_classes=0)
    write_model_folder(tmp_path / "narrow", narrow.describe(), narrow.state_dict(), ModelCard("generator", (999,)))
    with pytest.raises(UserError, match=r"generator\.start_from=.*narrow is another network than the teacher"):
        start_roles(roles_like(teacher), tmp_path / "narrow")


def test_start_from_a_run_of_another_network(teacher_folder: Path, earlier_run: Path) -> None:
    colour = tiny_denoiser(channels=3)
    roles = build_roles(colour, with_discriminator=False)
    with pytest.raises(UserError, match="the checkpoint's generator is another network") as error:
        start_roles(roles, earlier_run)
    assert "\n" not in str(error.value)


def test_start_from_nothing(teacher: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        start_roles(roles_like(teacher), tmp_path / "nowhere")


def test_start_from_a_teacher(teacher: Model, teacher_folder: Path) -> None:
    with pytest.raises(UserError, match="is a teacher without a step schedule"):
        start_roles(roles_like(teacher), teacher_folder)


# --- The teacher a recipe was written for


def test_teacher_of_another_shape_than_the_recipe(teacher_folder: Path) -> None:
    settings = settings_of(
        teacher={"path": str(teacher_folder), "network": "imagenet64-adm"}, compute={"device": "cpu"}
    )
    with pytest.raises(UserError) as error:
        open_teacher(settings)
    message = str(error.value)
    assert f"teacher.path={teacher_folder} is no imagenet64-adm (teacher.network)" in message
    assert "set teacher.network='' to use it all the same" in message


def test_unknown_teacher_network(teacher_folder: Path) -> None:
    settings = settings_of(teacher={"path": str(teacher_folder), "network": "imagenet-adm"}, compute={"device": "cpu"})
    with pytest.raises(
        UserError, match=r"teacher\.network='imagenet-adm' is not a released network; choose one of .*imagenet64-adm"
    ):
        open_teacher(settings)


def test_the_right_teacher_is_accepted_whatever_its_dropout() -> None:
    """Released teachers carry the dropout they were trained with; distillation has none."""
    denoiser = build_released("cifar10-ddpmpp")
    with torch.device("meta"):
        wider = EDMDenoiser(build_network_config("ffhq64-ddpmpp", img_resolution=64, img_channels=3, label_dim=10))
    settings = settings_of(teacher={"path": "x", "network": "cifar10-ddpmpp"})
    check_network(denoiser, settings)
    with pytest.raises(UserError, match="is no cifar10-ddpmpp"):
        check_network(wider, settings)


@pytest.mark.parametrize(("mode", "dtype"), [("shared_base", torch.bfloat16), ("full", torch.float32)])
def test_a_base_of_adapters_alone_comes_to_its_device_as_it_is_stored(
    teacher_folder: Path, mode: str, dtype: torch.dtype
) -> None:
    """Elsewhere trained networks start from the teacher in float32."""
    settings = settings_of(
        teacher={"path": str(teacher_folder)}, memory={"mode": mode, "base": "bf16"},
        compute={"precision": "bf16", "device": "cpu"},
    )  # fmt: skip
    teacher = open_teacher(settings).denoiser
    assert {parameter.dtype for parameter in teacher.parameters()} == {dtype}
    assert teacher.compute_dtype == torch.bfloat16


def test_no_teacher() -> None:
    with pytest.raises(UserError, match=r"teacher\.path is not set"):
        open_teacher(settings_of())


# --- DMD with regression, from the pairs to the generator


def test_dmd_with_regression_end_to_end(teacher_folder: Path, pairs_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dmd"
    settings = tiny_train_settings(
        teacher_folder, tmp_path, folder, data={"images": "", "pairs": str(pairs_folder)},
        losses={**NO_GAN, "regression_weight": 0.25}, training={"num_steps": 3, "generator_every": 1},
    )  # fmt: skip
    result = train(settings).model_folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "regression_loss" in line]
    assert [line["step"] for line in steps] == [0, 1, 2]
    for line in steps:
        assert line["regression_loss"] > 0
        assert line["regression_norm_at_x0"] > 0
        assert "generator_grad_norm" in line
        assert "gan_generator_loss" not in line
    assert load_generator(result).card.step_indices == (999,)


def test_regression_brings_the_generator_to_the_stored_images(
    teacher_folder: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    """Alone and long enough, it reproduces the teacher's images from their noises better than at the start."""
    settings = tiny_train_settings(
        teacher_folder, tmp_path, tmp_path / "dmd", data={"images": "", "pairs": str(pairs_folder)},
        losses={**NO_GAN, "regression_weight": 1.0, "distribution_matching_weight": 0.0},
        generator={"ema_half_life_images": 0.0}, optimizer={"generator_lr": 2e-3},
        training={"num_steps": 25, "generator_every": 1}, run={"sample_every": 1000, "checkpoint_every": 1000},
    )  # fmt: skip
    train(settings)
    lines = [json.loads(line) for line in (tmp_path / "dmd/metrics.jsonl").read_text().splitlines()]
    losses = [line["regression_loss"] for line in lines if "regression_loss" in line]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_a_warmup_of_several_steps(teacher_folder: Path, pairs_folder: Path, tmp_path: Path) -> None:
    """Its generator has these steps, and distillation starts from it."""
    steps = {"step_indices": [999, 499]}
    train(tiny_train_settings(
        teacher_folder, tmp_path, tmp_path / "warm", data={"images": "", "pairs": str(pairs_folder)}, generator=steps,
        losses={**NO_GAN, "regression_weight": 1.0, "distribution_matching_weight": 0.0}, training={"num_steps": 2},
    ))  # fmt: skip
    warm = load_generator(tmp_path / "warm")
    assert warm.card.step_indices == (999, 499)
    settings = tiny_train_settings(
        teacher_folder, tmp_path, tmp_path / "run", data={"images": ""}, losses=NO_GAN,
        generator={**steps, "start_from": str(tmp_path / "warm")}, training={"num_steps": 1}, optimizer={"generator_lr": 1e-12},
    )  # fmt: skip
    train(settings)
    began = load_generator(tmp_path / "run").denoiser.state_dict()
    assert all(torch.allclose(value, began[name], atol=1e-9) for name, value in warm.denoiser.state_dict().items())


def test_a_warmup_that_recomputes_activations_is_the_same_run(
    teacher_folder: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    losses = []
    for recompute in (False, True):
        folder = tmp_path / f"run{recompute}"
        train(tiny_train_settings(
            teacher_folder, tmp_path, folder, data={"images": "", "pairs": str(pairs_folder)},
            losses={**NO_GAN, "regression_weight": 1.0, "distribution_matching_weight": 0.0},
            training={"num_steps": 3}, run={"sample_every": 1000, "checkpoint_every": 1000},
            memory={"checkpoint_activations": recompute},
        ))  # fmt: skip
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["regression_loss"] for line in lines if "regression_loss" in line])
    assert losses[0] == losses[1]


def test_regression_without_pairs(teacher: Model) -> None:
    with pytest.raises(UserError, match=r"losses\.regression_weight needs data\.pairs"):
        build_distillation(settings_of(losses={"regression_weight": 0.25}), teacher, teacher.conditioner.every)


def test_pairs_of_another_shape(pairs_folder: Path) -> None:
    other = build_model(tiny_denoiser(resolution=32), ModelCard("teacher"))
    settings = settings_of(data={"pairs": str(pairs_folder)}, losses={"regression_weight": 0.25})
    with pytest.raises(
        UserError, match=r"data\.pairs=.* holds images of shape \(1, 16, 16\), the teacher makes \(1, 32, 32\)"
    ):
        build_distillation(settings, other, other.conditioner.every)


def test_pairs_of_a_teacher_with_more_classes(pairs_folder: Path) -> None:
    other = build_model(tiny_denoiser(num_classes=2), ModelCard("teacher"))
    settings = settings_of(data={"pairs": str(pairs_folder)}, losses={"regression_weight": 0.25})
    with pytest.raises(UserError, match=r"data\.pairs=.* holds labels up to 3, the teacher has 2 classes"):
        build_distillation(settings, other, other.conditioner.every)


def test_a_bf16_teacher_beside_full_networks(teacher_folder: Path) -> None:
    """The teacher is stored in half; generator and fake score start as its float32 weights and stay float32."""
    settings = settings_of(
        memory={"base": "bf16"}, compute={"precision": "bf16", "device": "cpu"},
        losses={"gan_generator_weight": 0.2, "gan_discriminator_weight": 0.3},
    )  # fmt: skip
    teacher = load_teacher(teacher_folder, device="cpu", precision="bf16")
    weights = {name: value.clone() for name, value in teacher.denoiser.state_dict().items()}
    run = build_distillation(settings, teacher, teacher.conditioner.every)
    roles = run.roles
    assert {parameter.dtype for parameter in roles.teacher.parameters()} == {torch.bfloat16}
    for role in (roles.generator, roles.fake_score):
        assert {parameter.dtype for parameter in role.parameters()} == {torch.float32}
        assert all(torch.equal(value, weights[name]) for name, value in role.state_dict().items())
    noisy, level = torch.randn(2, 1, 16, 16), torch.full((2,), 1.0)
    condition = teacher.conditioner.every.rows(torch.tensor([0, 1]))
    with torch.no_grad():
        half, whole = (network.denoise(noisy, level, condition) for network in (roles.teacher, roles.fake_score))
    assert half.dtype == torch.float32
    assert relative_error(half, whole) < 0.02  # the fake score computes in bf16 too
    draws = Draws.of_batch(0, 0, 2)
    real = RealBatch(torch.randn(2, 1, 16, 16), condition)
    metrics = two_time_scale_step(run, 0, real, draws)
    assert all(value.isfinite() for value in metrics.values())
    assert {parameter.dtype for parameter in roles.generator.parameters()} == {torch.float32}


@pytest.mark.parametrize("mode", ["full", "lora_generator", "shared_base"])
def test_frozen_bf16_does_not_go_with_fp32(mode: str) -> None:
    with pytest.raises(UserError, match=r"memory\.base='bf16' needs compute\.precision='bf16'"):
        settings_of(memory={"mode": mode, "base": "bf16"}, compute={"precision": "fp32"})


def test_pairs_of_other_than_256_steps_are_said(teacher: Model, pairs_folder: Path, tmp_path: Path) -> None:
    """DMD's published pairs are of 256 Heun steps."""
    settings = settings_of(data={"pairs": str(pairs_folder)}, losses={"regression_weight": 0.25})
    lines = check_pairs(settings, teacher)
    told = (
        f"warning: data.pairs={pairs_folder} was made in 3 steps of the teacher's sampler; DMD's published pairs are of 256 "
        "(fewstep prepare pairs --teacher-steps 256)"
    )
    assert told in lines
    shutil.copytree(pairs_folder, tmp_path / "pairs")
    manifest = tmp_path / "pairs/manifest.json"
    manifest.write_text(manifest.read_text().replace('"num_steps": 3', '"num_steps": 256'))
    settings = settings_of(data={"pairs": str(tmp_path / "pairs")}, losses={"regression_weight": 0.25})
    assert not any("256" in line for line in check_pairs(settings, teacher))


def test_pairs_that_no_loss_reads_are_said(teacher: Model, pairs_folder: Path) -> None:
    """They were set, and left out without a word."""
    (line,) = check_pairs(settings_of(data={"pairs": str(pairs_folder)}), teacher)
    assert line == (
        f"warning: data.pairs={pairs_folder} is not read: only the regression loss learns from pairs; set "
        "losses.regression_weight, or leave out data.pairs"
    )


def test_pairs_of_another_network_are_refused(teacher: Model, pairs_folder: Path, tmp_path: Path) -> None:
    """A class teacher is known by its weights too; pairs of an earlier version do not say whose they are."""
    settings = settings_of(data={"pairs": str(pairs_folder)}, losses={"regression_weight": 0.25})
    other = build_model(tiny_denoiser(num_classes=4), ModelCard("teacher"))
    with torch.no_grad():
        next(other.denoiser.parameters()).add_(1)
    with pytest.raises(UserError, match="was made by another network than the teacher's"):
        check_pairs(settings, other)
    shutil.copytree(pairs_folder, tmp_path / "pairs")
    manifest = json.loads((tmp_path / "pairs/manifest.json").read_text())
    del manifest["job"]["network"]
    (tmp_path / "pairs/manifest.json").write_text(json.dumps(manifest))
    settings = settings_of(data={"pairs": str(tmp_path / "pairs")}, losses={"regression_weight": 0.25})
    assert "does not say which network made it" in check_pairs(settings, teacher)[0]


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_quantised_base_is_for_loras(base: str) -> None:
    told = rf"memory\.base='{base}' is for a frozen base under LoRAs, and memory\.mode='full' trains whole networks: set memory\.mode"
    with pytest.raises(UserError, match=told):
        settings_of(memory={"base": base})
    for mode in ("shared_base", "lora_generator"):
        assert settings_of(memory={"base": base, "mode": mode}).memory.base == base


def test_an_unknown_base() -> None:
    with pytest.raises(UserError, match=r"memory\.base='int4': Input should be 'fp32', 'bf16', 'int8' or 'nf4'"):
        settings_of(memory={"base": "int4", "mode": "shared_base"})


def test_a_quantised_base_lies_whole_in_every_process() -> None:
    sharded, whole = (
        settings_of(memory={"base": "nf4", "mode": "shared_base", "teacher": teacher}, training={"batch_size": 4})
        for teacher in ("sharded", "replicated")
    )
    assert own_settings(sharded, 1).training.batch_size == 4
    assert own_settings(whole, 2).training.batch_size == 2
    with pytest.raises(
        UserError, match=r"memory\.base='nf4' lies whole in each of 2 processes: set memory\.teacher='replicated'"
    ):
        own_settings(sharded, 2)


SHARED: dict[str, Any] = {"mode": "shared_base", "teacher": "offloaded_blocks", "checkpoint_activations": True}


@pytest.mark.parametrize(
    ("memory", "device", "told"),
    [
        (SHARED, "cpu", "moves blocks between host memory and a CUDA GPU, and this run is on none: leave it out"),
        (
            SHARED | {"mode": "full"},
            "cuda",
            "is for a frozen base under LoRAs: set memory.mode to shared_base or lora_generator",
        ),
        (SHARED | {"checkpoint_activations": False}, "cuda", "needs memory.checkpoint_activations=true: without it"),
    ],
)
def test_offloaded_blocks_that_cannot_be(memory: dict[str, Any], device: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"memory.teacher='offloaded_blocks' {told}")):
        settings_of(memory=memory, compute={"device": device})


def test_offloaded_blocks_need_a_gpu_that_is_there(teacher_folder: Path) -> None:
    settings = settings_of(teacher={"path": str(teacher_folder)}, memory=SHARED)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"memory\.teacher='offloaded_blocks' moves blocks .* this run is on none"):
        open_teacher(settings)


def test_offloaded_blocks_lie_whole_in_every_process() -> None:
    settings = settings_of(memory=SHARED | {"base": "nf4"}, training={"batch_size": 4})
    assert own_settings(settings, 2).memory.offload_blocks
    assert own_settings(settings, 1).memory.offload_blocks
