"""Runs that start from DMD2's own checkpoints take exactly the step that they take from ours."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.data.captioned_images import open_captioned_images
from fewstep.distillation.roles import Roles, build_roles
from fewstep.errors import UserError
from fewstep.families.registry import family_named
from fewstep.formats.dmd2_folder import DMD2Checkpoint
from fewstep.formats.fingerprints import vae_fingerprint
from fewstep.models.load import load_teacher
from fewstep.models.model import Model, build_model
from fewstep.networks.autoencoder import load_autoencoder
from fewstep.preparation.conversion import convert_dmd2
from fewstep.preparation.latents import prepare_latents
from fewstep.settings import TrainSettings
from fewstep.training.build import start_roles
from fewstep.training.checkpoint import list_checkpoints, read_checkpoint
from fewstep.training.run import train
from tests.conftest import write_pictures
from tests.dmd2_files import edm_network, head_for, save_dmd2, write_dmd2_folder
from tests.tiny_models import tiny_sdxl_folder
from tests.training.helpers import tiny_train_settings

ROLES = ("generator.", "fake_score.", "discriminator.")
ONE_STEP = {"training": {"num_steps": 1, "generator_every": 1}, "run": {"checkpoint_every": 1}}
TWO_STEPS = {"training": {"num_steps": 2, "generator_every": 1}}


def last(run: Path) -> dict[str, Tensor]:
    tensors, _ = read_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    return {name: value for name, value in tensors.items() if name.startswith(ROLES)}


def as_dmd2(run: Path, folder: Path, layout: Any) -> Path:
    """A run's last checkpoint in DMD2's layout."""
    tensors, drop = last(run), "network." if layout == "diffusers" else ""
    parts = [
        {name.removeprefix(role).removeprefix(drop): v for name, v in tensors.items() if name.startswith(role)}
        for role in ROLES
    ]
    write_dmd2_folder(folder, DMD2Checkpoint(layout, *parts))
    return folder


def assert_same_step(settings: Any, sources: dict[str, Path], place: Path) -> None:
    """One step from each source ends in the same weights, to the bit."""
    for name, source in sources.items():
        train(settings(place / name, generator={"start_from": str(source)}, **ONE_STEP))
    first, *others = (last(place / name) for name in sources)
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first)
    start = last(sources["ours"])
    assert any(not torch.equal(start[name], first[name]) for name in first if name.startswith("generator."))


def test_edm_runs_continue_the_authors_checkpoints(
    teacher_folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pictures = write_pictures(tmp_path_factory.mktemp("pictures"))

    def settings(folder: Path, **changes: dict[str, Any]) -> TrainSettings:
        return tiny_train_settings(teacher_folder, pictures, folder, **changes)

    train(settings(tmp_path / "earlier", **TWO_STEPS))
    dmd2 = as_dmd2(tmp_path / "earlier", tmp_path / "t_checkpoint_model_2", "edm")
    convert_dmd2(dmd2, tmp_path / "converted", base=str(teacher_folder))
    sources = {"ours": tmp_path / "earlier", "dmd2": dmd2, "converted": tmp_path / "converted"}
    assert_same_step(settings, sources, tmp_path / "runs")


def captioned(folder: Path) -> Path:
    folder.mkdir()
    random, lines = np.random.default_rng(0), []
    for number in range(4):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": "red cat"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_text_runs_continue_the_authors_checkpoints(tmp_path: Path) -> None:
    base = tiny_sdxl_folder(tmp_path / "sdxl")
    prepare_latents(
        load_autoencoder(base), family_named("sdxl").text_encoders(base), open_captioned_images(str(captioned(tmp_path / "pictures"))),
        tmp_path / "latents", resolution=16, vae_fingerprint=vae_fingerprint(base),
    )  # fmt: skip
    (tmp_path / "prompts.txt").write_text("red cat\na dog\n")

    def settings(folder: Path, **changes: dict[str, Any]) -> TrainSettings:
        generator = {"step_indices": [999, 749, 499, 249], "ema_half_life_images": 0, **changes.pop("generator", {})}
        data = {"images": "", "prompts": str(tmp_path / "prompts.txt"), "latents": str(tmp_path / "latents")}
        return tiny_train_settings(base, tmp_path, folder, generator=generator, data=data, **changes)

    train(settings(tmp_path / "earlier", **TWO_STEPS))
    dmd2 = as_dmd2(tmp_path / "earlier", tmp_path / "t_checkpoint_model_2", "diffusers")
    convert_dmd2(dmd2, tmp_path / "converted", base=str(base), step_indices=(999, 749, 499, 249))
    sources = {"ours": tmp_path / "earlier", "dmd2": dmd2, "converted": tmp_path / "converted"}
    assert_same_step(settings, sources, tmp_path / "runs")


# --- What is there is taken, what is not stays the teacher's


@pytest.fixture
def teacher() -> Model:
    from fewstep.formats.model_folder import ModelCard

    return build_model(edm_network(0), ModelCard("teacher"))


def roles_of(teacher: Model, with_discriminator: bool = True) -> Roles:
    torch.manual_seed(7)
    return build_roles(teacher.denoiser, with_discriminator)


def is_like(module: Any, other: Any) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in module.state_dict().items())


def test_a_file_with_the_generator_alone(teacher: Model, tmp_path: Path) -> None:
    torch.save(edm_network(1).state_dict(), tmp_path / "generator.bin")
    roles, untouched = roles_of(teacher), roles_of(teacher)
    start_roles(roles, tmp_path / "generator.bin")
    assert is_like(roles.generator, edm_network(1))
    assert is_like(roles.fake_score, edm_network(0))
    assert is_like(roles.discriminator, untouched.discriminator)
    assert all(parameter.requires_grad for parameter in roles.generator.parameters())


@pytest.mark.parametrize("converted", [False, True])
def test_without_gan_the_head_is_left_out(teacher: Model, tmp_path: Path, converted: bool) -> None:
    source = save_dmd2(tmp_path / "t_checkpoint_model_1", edm_network(1), edm_network(2), head_for(edm_network(2)))
    if converted:
        convert_dmd2(source, tmp_path / "out")
        source = tmp_path / "out"
    roles = roles_of(teacher, with_discriminator=False)
    start_roles(roles, source)
    assert roles.discriminator is None
    assert is_like(roles.generator, edm_network(1))
    assert is_like(roles.fake_score, edm_network(2))
    assert is_like(roles.teacher, edm_network(0))
    with_head = roles_of(teacher)
    start_roles(with_head, source)
    assert is_like(with_head.discriminator, head_for(edm_network(2)))


# --- Refusals


@pytest.mark.parametrize("converted", [False, True])
def test_a_published_head_reads_the_published_feature(teacher: Model, tmp_path: Path, converted: bool) -> None:
    source = save_dmd2(tmp_path / "t_checkpoint_model_1", edm_network(1), edm_network(2), head_for(edm_network(2)))
    if converted:
        convert_dmd2(source, tmp_path / "out")
        source = tmp_path / "out"
    teacher.denoiser.tap_at([0.7])  # of the same shape
    refused(roles_of(teacher), source, "its discriminator reads the published feature alone: leave losses.gan_taps out")


def refused(roles: Roles, source: Path, *messages: str) -> None:
    with pytest.raises(UserError) as caught:
        start_roles(roles, source)
    assert str(caught.value).startswith(f"generator.start_from={source}: ")
    assert all(message in str(caught.value) for message in messages), caught.value
    assert "\n" not in str(caught.value)


def test_refuses_checkpoints_of_other_networks(teacher: Model, tmp_path: Path) -> None:
    other = save_dmd2(
        tmp_path / "a_checkpoint_model_1", edm_network(1, label_dim=9), edm_network(1), head_for(edm_network(1))
    )
    refused(roles_of(teacher), other, "its generator is another network", "model.map_label.weight (32, 9) for (32, 4)")
    song = edm_network(1, "ddpmpp")
    refused(
        roles_of(teacher), save_dmd2(tmp_path / "b", song, song, head_for(song)), "its generator is another network"
    )
    fake = save_dmd2(
        tmp_path / "c_checkpoint_model_1", edm_network(1), edm_network(1, label_dim=9), head_for(edm_network(1))
    )
    refused(roles_of(teacher), fake, "its fake score is another network")
    head = save_dmd2(tmp_path / "d", edm_network(1), edm_network(1), torch.nn.Sequential(torch.nn.Conv2d(4, 1, 1)))
    refused(roles_of(teacher), head, "its discriminator has 1 layers with weights (0)")


def test_refuses_damaged_checkpoints(teacher: Model, tmp_path: Path) -> None:
    source = save_dmd2(tmp_path / "t_checkpoint_model_1", edm_network(1), edm_network(1), head_for(edm_network(1)))
    convert_dmd2(source, tmp_path / "out")
    content = (source / "pytorch_model_1.bin").read_bytes()
    (source / "pytorch_model_1.bin").write_bytes(content[: len(content) // 2])
    refused(roles_of(teacher), source, "pytorch_model_1.bin: not a readable torch weights file")
    (tmp_path / "out/roles/fake_score.safetensors").write_bytes(b"nonsense")
    refused(roles_of(teacher), tmp_path / "out", "cannot be read", "convert the checkpoint again")


@pytest.mark.parametrize("mode", ["lora_generator", "shared_base"])
def test_a_full_network_starts_no_lora(tmp_path: Path, mode: str) -> None:
    from fewstep.settings import parse_settings
    from fewstep.training.build import build_chosen_roles

    teacher: Any = load_teacher(tiny_sdxl_folder(tmp_path / "sdxl"), device="cpu")
    torch.save(teacher.denoiser.network.state_dict(), tmp_path / "unet.bin")
    settings = parse_settings(TrainSettings, {"memory": {"mode": mode, "lora_rank": 4}}, "test")
    refused(
        build_chosen_roles(settings, teacher.denoiser),
        tmp_path / "unet.bin",
        "no LoRA can start as one",
        "memory.mode=full",
    )


def test_a_converted_lora_starts_a_run_of_its_rank_and_alpha(tmp_path: Path) -> None:
    from fewstep.formats.kohya_lora import lora_from_state, write_kohya_lora
    from fewstep.networks.adapters import AdapterRole, LoraShape, SharedBase
    from fewstep.preparation.conversion import convert_lora
    from fewstep.settings import parse_settings
    from fewstep.training.build import build_chosen_roles

    base = tiny_sdxl_folder(tmp_path / "sdxl")
    role = SharedBase(load_teacher(base, device="cpu").denoiser, LoraShape(rank=4, alpha=8.0)).add_role("generator")
    with torch.no_grad():
        for parameter in role.parameters():
            parameter.normal_()
    write_kohya_lora(tmp_path / "dmd2_4step.safetensors", lora_from_state(role.adapter_state(), 4, 8.0), {})
    convert_lora(tmp_path / "dmd2_4step.safetensors", tmp_path / "out", base=str(base))
    for alpha in (8.0, 16.0):
        memory = {"mode": "lora_generator", "lora_rank": 4, "lora_alpha": alpha}
        settings = parse_settings(TrainSettings, {"memory": memory}, "test")
        roles = build_chosen_roles(settings, load_teacher(base, device="cpu").denoiser)
        if alpha == 16.0:
            refused(roles, tmp_path / "out", "its LoRA has alpha 8 and the run's 16; set memory.lora=[4, 8]")
            continue
        start_roles(roles, tmp_path / "out")
        assert isinstance(roles.generator, AdapterRole)
        expected = role.adapter_state()
        assert roles.generator.adapter_state().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in roles.generator.adapter_state().items())
