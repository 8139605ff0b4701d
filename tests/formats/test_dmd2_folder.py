"""DMD2 checkpoints are read as the published files are laid out; what does not fit is named and refused."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.formats.dmd2_folder import (
    DMD2Checkpoint,
    fit_discriminator,
    is_dmd2_checkpoint,
    read_dmd2,
)
from tests.dmd2_files import Guidance, edm_network, head_for, same, save_dmd2, write_dmd2_folder
from tests.tiny_networks import tiny_text_denoiser


@pytest.fixture(scope="module")
def edm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dmd2") / "time_1_checkpoint_model_000100"
    return save_dmd2(folder, edm_network(0), edm_network(1), head_for(edm_network(1)), real=edm_network(2))


def test_reads_an_edm_folder(edm_folder: Path) -> None:
    found = read_dmd2(edm_folder)
    assert found.layout == "edm"
    assert same(found.generator, edm_network(0).state_dict())
    assert same(found.fake_score, edm_network(1).state_dict())
    assert same(found.discriminator, head_for(edm_network(1)).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_reads_a_diffusers_folder(tmp_path: Path, family: str) -> None:
    generator, fake = tiny_text_denoiser(family), tiny_text_denoiser(family)
    with torch.no_grad():
        for parameter in fake.parameters():
            parameter.add_(0.1)
    save_dmd2(tmp_path / "x_checkpoint_model_1", generator.network, fake.network, head_for(fake))
    found = read_dmd2(tmp_path / "x_checkpoint_model_1")
    assert found.layout == "diffusers"
    assert same(found.generator, generator.network.state_dict())
    assert same(found.fake_score, fake.network.state_dict())


def test_reads_a_single_generator_file(tmp_path: Path, edm_folder: Path) -> None:
    found = read_dmd2(edm_folder / "pytorch_model.bin")
    assert same(found.generator, edm_network(0).state_dict())
    assert (found.fake_score, found.discriminator) == ({}, {})
    half = {name: value.half() for name, value in tiny_text_denoiser("sdxl").network.state_dict().items()}
    torch.save(half, tmp_path / "dmd2_sdxl_4step_unet_fp16.bin")
    assert same(read_dmd2(tmp_path / "dmd2_sdxl_4step_unet_fp16.bin").generator, half)


@pytest.mark.parametrize("names", [("model", "model_1"), ("pytorch_model", "pytorch_model_1")])
def test_reads_safetensors_twins(tmp_path: Path, edm_folder: Path, names: tuple[str, str]) -> None:
    save_file(edm_network(0).state_dict(), tmp_path / f"{names[0]}.safetensors")
    guidance = Guidance(edm_network(1), head_for(edm_network(1)), None)
    save_file(guidance.state_dict(), tmp_path / f"{names[1]}.safetensors")
    found, expected = read_dmd2(tmp_path), read_dmd2(edm_folder)
    for part in ("generator", "fake_score", "discriminator"):
        assert same(getattr(found, part), getattr(expected, part))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"ema_model.{name}",
        lambda name: f"generator._fsdp_wrapped_module.{name}",
        lambda name: name.replace("block0.", "block0._orig_mod.", 1),
    ],
)
def test_prefixes_and_constants_may_be_there_or_not(tmp_path: Path, rename: Any) -> None:
    network = edm_network(0).state_dict()
    torch.save({rename(name): value for name, value in network.items()}, tmp_path / "a.bin")
    assert same(read_dmd2(tmp_path / "a.bin").generator, network)
    constants = {"karras_sigmas": torch.ones(1000), "sigma_min": torch.tensor(0.002)}
    torch.save({**{rename(name): value for name, value in network.items()}, **constants}, tmp_path / "b.bin")
    assert same(read_dmd2(tmp_path / "b.bin").generator, network)


def test_the_teachers_copy_is_not_even_read(tmp_path: Path, edm_folder: Path) -> None:
    """Damage in it goes unnoticed, which shows that a checkpoint costs no memory for it."""
    (tmp_path / "pytorch_model.bin").write_bytes((edm_folder / "pytorch_model.bin").read_bytes())
    state = torch.load(edm_folder / "pytorch_model_1.bin", weights_only=True)
    for name in state:
        if name.startswith("real_unet."):
            state[name] = torch.full_like(state[name], torch.inf)
    torch.save(state, tmp_path / "pytorch_model_1.bin")
    assert same(read_dmd2(tmp_path).fake_score, read_dmd2(edm_folder).fake_score)


@pytest.mark.slow
@pytest.mark.parametrize("with_teacher", [False, True])
def test_written_folders_are_what_torch_reads(tmp_path: Path, edm_folder: Path, with_teacher: bool) -> None:
    found, teacher = read_dmd2(edm_folder), edm_network(2).state_dict() if with_teacher else None
    write_dmd2_folder(tmp_path / "out", found, teacher)
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["pytorch_model.bin", "pytorch_model_1.bin"]
    for part in ("generator", "fake_score", "discriminator"):
        assert same(getattr(read_dmd2(tmp_path / "out"), part), getattr(found, part))
    generator, guidance = edm_network(5), Guidance(edm_network(6), head_for(edm_network(6), 3), None)
    generator.load_state_dict(torch.load(tmp_path / "out/pytorch_model.bin", weights_only=True))
    state = torch.load(tmp_path / "out/pytorch_model_1.bin", weights_only=True)
    assert any(name.startswith("real_unet.") for name in state) == with_teacher
    missing, unexpected = guidance.load_state_dict(state, strict=False)
    assert missing == ["karras_sigmas"]
    assert all(name.startswith("real_unet.") for name in unexpected)
    assert same(guidance.fake_unet.state_dict(), edm_network(1).state_dict())


def test_a_generator_alone_is_one_file(tmp_path: Path, edm_folder: Path) -> None:
    write_dmd2_folder(tmp_path / "out", DMD2Checkpoint("edm", read_dmd2(edm_folder).generator))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pytorch_model.bin"]
    assert read_dmd2(tmp_path / "out").fake_score == {}


def test_what_looks_like_one(tmp_path: Path, edm_folder: Path, teacher_folder: Path) -> None:
    assert is_dmd2_checkpoint(edm_folder)
    assert is_dmd2_checkpoint(edm_folder / "pytorch_model.bin")
    assert not is_dmd2_checkpoint(teacher_folder)
    assert not is_dmd2_checkpoint(tmp_path)
    assert not is_dmd2_checkpoint(tmp_path / "nowhere")


# --- The discriminator


def head_tensors() -> dict[str, Tensor]:
    return head_for(edm_network(1)).state_dict()


@pytest.mark.parametrize("placeholder", [nn.Dropout(0.1), nn.Identity(), nn.SiLU()])
def test_layers_of_the_head_are_matched_by_order(placeholder: nn.Module) -> None:
    """Activations and dropout have no weights but take numbers."""
    ours = head_for(edm_network(1))
    shifted = nn.Sequential(placeholder, *(part for layer in ours for part in (layer, placeholder)))
    assert list(shifted.state_dict()) != list(ours.state_dict())
    found = fit_discriminator(shifted.state_dict(), ours.state_dict(), "x")
    assert same(found, ours.state_dict())
    nested = nn.Sequential(nn.Sequential(*list(ours)[:3]), nn.Sequential(*list(ours)[3:]))
    assert same(fit_discriminator(nested.state_dict(), ours.state_dict(), "x"), ours.state_dict())


def test_layers_are_ordered_by_number_and_not_by_letter() -> None:
    torch.manual_seed(0)
    layers = {f"{number}.weight": torch.randn(1) for number in (0, 2, 10, 11)}
    shuffled = {name: layers[name] for name in ("10.weight", "0.weight", "11.weight", "2.weight")}
    expected = {f"{number}.weight": torch.zeros(1) for number in range(4)}
    found = fit_discriminator(shuffled, expected, "x")
    assert [found[f"{number}.weight"].item() for number in range(4)] == [value.item() for value in layers.values()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if not k.startswith("6.")}, "has 4 layers with weights (0, 1, 3, 4), the"),
        (lambda t: {k: v for k, v in t.items() if k != "3.bias"}, "layer cls_pred_branch.3 of its discriminator has"),
        (lambda t: {**t, "0.weight": t["0.weight"][:, :5]}, "layer cls_pred_branch.0 of its discriminator has"),
        (lambda t: {**t, "head.weight": t["0.weight"]}, "cls_pred_branch.head.weight is no layer of a sequential"),
    ],
)  # fmt: skip
def test_refuses_other_heads(change: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        fit_discriminator(change(head_tensors()), head_tensors(), "file")
    assert message in str(caught.value)
    assert str(caught.value).startswith("file: ")


# --- Bad input


def refused(path: Path, *messages: str) -> None:
    with pytest.raises(UserError) as caught:
        read_dmd2(path)
    assert all(message in str(caught.value) for message in messages), caught.value
    assert "\n" not in str(caught.value)


def test_refuses_folders_without_weights(tmp_path: Path, edm_folder: Path) -> None:
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, f"{tmp_path} is a folder without weights: no pytorch_model.bin")
    refused(edm_folder.parent, "holds 1 checkpoint folders; give one of them, e.g. ", edm_folder.name)
    (tmp_path / "pytorch_model_1.bin").write_bytes((edm_folder / "pytorch_model_1.bin").read_bytes())
    refused(tmp_path, "is a folder without weights")


@pytest.mark.parametrize(
    "state",
    [nn.Linear(2, 2).state_dict(), nn.Sequential(nn.Conv2d(1, 1, 1)).state_dict(), OrderedDict(), head_tensors()],
)
def test_refuses_other_models(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "holds neither an EDM network", str(list(state)[:3]))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"optimizer.step": torch.ones(1)}, "holds ['optimizer.step']"),
        (head_tensors(), "should hold fake_unet.* and cls_pred_branch.*, and holds ['0.weight', '0.bias', '1.weight']"),
        ({"cls_pred_branch.0.weight": torch.ones(1)}, "holds ['cls_pred_branch.0.weight']"),
        ({f"fake_unet.{k}": v for k, v in tiny_text_denoiser("sd").network.state_dict().items()},
         "its fake score is another kind of network than the generator"),
        ({f"fake_unet.{k}": v for k, v in nn.Linear(1, 1).state_dict().items()}, "holds neither an EDM network"),
    ],
)  # fmt: skip
def test_refuses_other_second_files(tmp_path: Path, edm_folder: Path, state: dict[str, Tensor], message: str) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes((edm_folder / "pytorch_model.bin").read_bytes())
    torch.save(state, tmp_path / "pytorch_model_1.bin")
    refused(tmp_path, str(tmp_path / "pytorch_model_1.bin"), message)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("pytorch_model.bin", "model.out_conv.weight"),
        ("pytorch_model_1.bin", "fake_unet.model.map_layer0.bias"),
        ("pytorch_model_1.bin", "cls_pred_branch.3.weight"),
    ],
)
def test_refuses_infinities_by_name(tmp_path: Path, edm_folder: Path, file: str, name: str, value: float) -> None:
    for other in edm_folder.iterdir():
        (tmp_path / other.name).write_bytes(other.read_bytes())
    state = torch.load(tmp_path / file, weights_only=True)
    state[name] = state[name].half()
    state[name].view(-1)[1] = value
    torch.save(state, tmp_path / file)
    refused(tmp_path, f"{tmp_path / file}: 1 of the ", f"in {name} are infinite or NaN")


def test_refuses_two_tensors_of_one_name(tmp_path: Path) -> None:
    state = edm_network(0).state_dict()
    torch.save({**state, "map_layer0.weight": state["model.map_layer0.weight"]}, tmp_path / "a.bin")
    refused(tmp_path / "a.bin", "two tensors of the checkpoint have one name")


def test_refuses_damaged_safetensors(tmp_path: Path) -> None:
    save_file(edm_network(0).state_dict(), tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"PK\x03\x04" + content[4:], b"\xff" * 16):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        refused(tmp_path, "cannot be read as safetensors", "download it again")


def test_several_networks_or_another_role_are_not_taken_for_the_generator(tmp_path: Path) -> None:
    state = {
        "conv_in.weight": torch.ones(1),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": torch.ones(1),
    }
    for prefix in ("", "unet.", "module.model."):
        save_file({prefix + name: value for name, value in state.items()}, tmp_path / "one.safetensors")
        assert list(read_dmd2(tmp_path / "one.safetensors").generator) == sorted(state)
    both = {prefix + name: value.clone() for prefix in ("model.", "ema_model.") for name, value in state.items()}
    save_file(both, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match=r"holds several networks \(ema_model\.\*, model\.\*\)"):
        read_dmd2(tmp_path / "two.safetensors")
    save_file({f"fake_unet.{name}": value for name, value in state.items()}, tmp_path / "fake.safetensors")
    with pytest.raises(UserError, match="holds neither an EDM network"):
        read_dmd2(tmp_path / "fake.safetensors")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.bf16.safetensors"])
def test_a_networks_own_folder_in_its_other_files(tmp_path: Path, name: str) -> None:
    state = {"conv_in.weight": torch.ones(1), "down_blocks.0.resnets.0.conv1.weight": torch.ones(1)}
    torch.save(state, tmp_path / name) if name.endswith(".bin") else save_file(state, tmp_path / name)
    assert same(read_dmd2(tmp_path).generator, state)
