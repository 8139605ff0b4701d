"""Other tools' files, built byte for byte from our own tiny networks, become folders that make the same pictures."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewstep
from fewstep.cli.convert import convert as convert_command
from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.formats.edm_pickle_writer import write_edm_pickle
from fewstep.formats.kohya_lora import lora_from_state, write_kohya_lora, write_peft_lora
from fewstep.formats.model_folder import ModelCard
from fewstep.formats.roles_folder import read_roles
from fewstep.formats.source import Source
from fewstep.models.model import build_model
from fewstep.networks.adapters import AdapterRole, LoraShape, SharedBase
from fewstep.preparation.conversion import convert_lora
from tests.cli.test_main import fewstep as fewstep_command
from tests.conftest import tiny_denoiser
from tests.dmd2_files import edm_arguments, edm_network, head_for, same, save_dmd2
from tests.formats.test_lora_names import with_ldm_names
from tests.tiny_models import tiny_sd_folder, tiny_sdxl_folder

PROMPTS = ["red cat", "a dog"]
FOUR = (999, 749, 499, 249)


def convert(source: Path, out: Path, base: str | Path = "", step_indices: str = "") -> None:
    convert_command(source, out, str(base), step_indices)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bases")
    return {"sd": tiny_sd_folder(place / "sd"), "sdxl": tiny_sdxl_folder(place / "sdxl")}


def moved(network: Denoiser, seed: int) -> Denoiser:
    """The network with other weights, in place."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return network


def unet_of(base: Path, seed: int) -> Any:
    teacher = fewstep.load_teacher(base, device="cpu")
    return moved(teacher.denoiser, seed)


def pictures_of(base: Path, network: Denoiser, steps: tuple[int, ...] = FOUR) -> Tensor:
    """What the network makes as a generator of this base."""
    teacher = fewstep.load_teacher(base, device="cpu")
    return teacher.student(network, ModelCard("generator", steps)).sample(PROMPTS, seed=5, output="tensor")


def converted_pictures(folder: Path) -> Tensor:
    generator = fewstep.load_generator(folder, device="cpu")
    return generator.sample(PROMPTS, seed=5, output="tensor")


# --- EDM pickles


@pytest.mark.parametrize("family", ["adm", "ddpmpp", "ncsnpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_edm_pickles_of_every_family(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    network = edm_network(0, family)
    weights = {name: value.to(dtype) for name, value in network.state_dict().items()}
    write_edm_pickle(tmp_path / "edm.pkl", weights, edm_arguments(network.config))
    convert(tmp_path / "edm.pkl", tmp_path / "out")
    before, after = (fewstep.load_teacher(tmp_path / name, device="cpu") for name in ("edm.pkl", "out"))
    assert not before.is_generator
    assert not after.is_generator
    assert torch.equal(
        before.sample(3, seed=2, num_inference_steps=3, output="tensor"),
        after.sample(3, seed=2, num_inference_steps=3, output="tensor"),
    )
    assert after.card.made_with["converted_from"] == "edm.pkl"
    if dtype == torch.float32:
        network_pictures = build_model(network, ModelCard("teacher")).sample(
            3, seed=2, num_inference_steps=3, output="tensor"
        )
        assert torch.equal(after.sample(3, seed=2, num_inference_steps=3, output="tensor"), network_pictures)


# --- DMD2 checkpoints of EDM networks


@pytest.mark.parametrize("family", ["adm", "ddpmpp", "ncsnpp"])
def test_edm_checkpoint_folder(tmp_path: Path, family: str) -> None:
    generator, fake = edm_network(0, family), edm_network(1, family)
    source = save_dmd2(tmp_path / "t_checkpoint_model_1", generator, fake, head_for(fake), real=edm_network(2, family))
    convert(source, tmp_path / "out")
    found = fewstep.load_generator(tmp_path / "out", device="cpu")
    assert found.is_generator
    assert found.card.step_indices == (999,)
    expected = build_model(generator, ModelCard("generator", (999,)))
    assert torch.equal(found.sample(3, seed=2, output="tensor"), expected.sample(3, seed=2, output="tensor"))
    roles = read_roles(tmp_path / "out")
    assert same(roles["fake_score"], fake.state_dict())
    assert same(roles["discriminator"], head_for(fake).state_dict())


def test_edm_checkpoint_without_buffers_or_prefix_and_with_steps(tmp_path: Path) -> None:
    network = edm_network(0, "adm")
    state = {n.removeprefix("model."): v for n, v in network.state_dict().items() if "resample_filter" not in n}
    torch.save({**state, "karras_sigmas": torch.ones(1000)}, tmp_path / "generator.bin")
    convert(tmp_path / "generator.bin", tmp_path / "out", step_indices="999,749, 499,249")
    found = fewstep.load_generator(tmp_path / "out", device="cpu")
    assert found.is_generator
    assert torch.equal(
        found.sample(3, output="tensor"), build_model(network, ModelCard("generator", FOUR)).sample(3, output="tensor")
    )
    assert not (tmp_path / "out/roles").exists()


def test_a_base_gives_the_shape_that_weights_do_not_show(tmp_path: Path, teacher_folder: Path) -> None:
    """Our own small networks fold pixels into channels."""
    network = moved(tiny_denoiser(), 3)
    source = save_dmd2(tmp_path / "t_checkpoint_model_1", network, tiny_denoiser(), head_for(tiny_denoiser()))
    convert(source, tmp_path / "out", teacher_folder)
    found = fewstep.load_generator(tmp_path / "out", device="cpu")
    assert found.is_generator
    assert torch.equal(
        found.sample(4, output="tensor"),
        build_model(network, ModelCard("generator", (999,))).sample(4, output="tensor"),
    )
    assert found.card.class_names == ("class0", "class1", "class2", "class3")


# --- Text-to-image networks


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_text_checkpoint_folder(tmp_path: Path, bases: dict[str, Path], family: str) -> None:
    base = bases[family]
    generator, fake = unet_of(base, 1), unet_of(base, 2)
    source = save_dmd2(tmp_path / "t_checkpoint_model_1", generator.network, fake.network, head_for(fake))
    convert(source, tmp_path / "out", base, "999,749,499,249")
    assert torch.equal(converted_pictures(tmp_path / "out"), pictures_of(base, generator))
    roles = read_roles(tmp_path / "out")
    assert same(roles["fake_score"], fake.network.state_dict())
    assert same(roles["discriminator"], head_for(fake).state_dict())


@pytest.mark.parametrize(
    ("family", "name", "steps"),
    [
        ("sdxl", "dmd2_sdxl_4step_unet_fp16.bin", FOUR),
        ("sdxl", "dmd2_sdxl_1step_unet_fp16.bin", (399,)),
        ("sd", "dmd2_sd15_1step_unet_fp16.bin", (999,)),
        ("sdxl", "dmd2_sdxl_4step_unet_fp16.safetensors", FOUR),
    ],
)
def test_released_files_know_their_steps(
    tmp_path: Path, bases: dict[str, Path], family: str, name: str, steps: tuple[int, ...]
) -> None:
    network = unet_of(bases[family], 4)
    half = {key: value.half() for key, value in network.network.state_dict().items()}
    save = save_file if name.endswith("safetensors") else torch.save
    save(half, tmp_path / name)
    convert(tmp_path / name, tmp_path / "out", bases[family])
    card = json.loads((tmp_path / "out/fewstep.json").read_text())
    assert tuple(card["step_indices"]) == steps
    stored = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}  # nothing lost, nothing blown up
    network.network.load_state_dict(half)
    assert torch.equal(converted_pictures(tmp_path / "out"), pictures_of(bases[family], network, steps))


@pytest.mark.parametrize("layout", ["kohya", "kohya, original block names", "peft", "peft folder"])
def test_loras(tmp_path: Path, bases: dict[str, Path], layout: str) -> None:
    teacher = fewstep.load_teacher(bases["sdxl"], device="cpu")
    role = SharedBase(teacher.denoiser, LoraShape(rank=4, alpha=8.0)).add_role("generator")
    moved(role, 6)
    lora = lora_from_state(role.adapter_state(), 4, 8.0)
    name = "pytorch_lora_weights" if layout == "peft folder" else "dmd2_sdxl_4step_lora_fp16"
    path = tmp_path / f"{name}.safetensors"
    if layout.startswith("kohya"):
        write_kohya_lora(path, lora, {})
        if layout != "kohya":
            with_ldm_names(path, UNet2DConditionModel.from_pretrained(bases["sdxl"] / "unet")).replace(path)
            assert "lora_unet_middle_block_1_proj_in.alpha" in load_file(path)
    else:
        write_peft_lora(path, lora, "unet", {})
    convert(tmp_path if layout == "peft folder" else path, tmp_path / "out", bases["sdxl"], "999,749,499,249")
    found = fewstep.load_generator(tmp_path / "out", device="cpu")
    assert isinstance(found.denoiser, AdapterRole)
    difference = (converted_pictures(tmp_path / "out") - pictures_of(bases["sdxl"], role)).abs().max()
    assert difference == 0 if layout.startswith("kohya") else difference < 1e-5
    assert found.card.step_indices == FOUR


def test_linear_layers_written_as_convolutions(tmp_path: Path, bases: dict[str, Path]) -> None:
    role = SharedBase(fewstep.load_teacher(bases["sd"], device="cpu").denoiser, LoraShape(rank=4, alpha=8.0)).add_role(
        "g"
    )
    moved(role, 6)
    write_kohya_lora(tmp_path / "a_4step.safetensors", lora_from_state(role.adapter_state(), 4, 8.0), {})
    plain = load_file(tmp_path / "a_4step.safetensors")
    other = {key: value[..., None, None] if value.ndim == 2 else value for key, value in plain.items()}
    save_file(other, tmp_path / "b_4step.safetensors")
    for name in "ab":
        convert(tmp_path / f"{name}_4step.safetensors", tmp_path / name, bases["sd"], "999,749,499,249")
    found, expected = (load_file(tmp_path / name / "adapter.safetensors") for name in "ba")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_single_files(tmp_path: Path, bases: dict[str, Path]) -> None:
    from fewstep.export.single_file import single_file_tensors

    teacher = fewstep.load_teacher(bases["sdxl"], device="cpu")
    generator = teacher.student(teacher.denoiser, ModelCard("generator", FOUR))
    tensors = {name: value.contiguous() for name, value in single_file_tensors(generator).items()}
    save_file(tensors, tmp_path / "sdxl.safetensors")
    convert(tmp_path / "sdxl.safetensors", tmp_path / "out", bases["sdxl"])
    options: dict[str, Any] = {"seed": 5, "num_inference_steps": 3, "guidance_scale": 2.0}
    again = fewstep.load_teacher(tmp_path / "out", device="cpu")
    assert torch.equal(
        again.sample(PROMPTS, **options, output="tensor"), teacher.sample(PROMPTS, **options, output="tensor")
    )  # type: ignore[arg-type]
    with pytest.raises(UserError, match="single-file checkpoint in the LDM layout: give a diffusers folder"):
        convert(tmp_path / "sdxl.safetensors", tmp_path / "other")


# --- Bad input: one sentence, nothing written


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("sdxl_lightning_4step_unet.safetensors", "lightning"), ("Hyper-SDXL-1step-Unet.safetensors", "hyper"),
        ("sdxl_turbo_1step.safetensors", "turbo"), ("lcm_4step_lora.safetensors", "lcm"), ("tcd-4steps.safetensors", "tcd"),
        ("my_own_4step.safetensors", ""), ("flash_sdxl_4step_unet.safetensors", "flash"),
    ],
)  # fmt: skip
def test_files_of_other_methods_ask_for_their_steps(
    bases: dict[str, Path], tmp_path: Path, name: str, word: str
) -> None:
    save_file(unet_of(bases["sdxl"], 1).network.state_dict(), tmp_path / name)
    said = f"by its name it is a {word} file" if word else "does not say which steps it was trained for: give"
    refused(tmp_path / name, tmp_path / "out", "give --step-indices", said, base=bases["sdxl"])
    convert(tmp_path / name, tmp_path / "out", bases["sdxl"], step_indices="999")
    assert json.loads((tmp_path / "out/fewstep.json").read_text())["step_indices"] == [999]


@pytest.mark.parametrize(
    ("name", "steps"), [("a_4step", FOUR), ("peft_4step", FOUR), ("4step_lora", FOUR), ("dmd2_1step_lora", (999,))]
)
def test_neutral_names_of_loras_are_taken_at_their_word(
    bases: dict[str, Path], tmp_path: Path, name: str, steps: tuple[int, ...]
) -> None:
    """No word of another method is in them; the answer says what was read off the name."""
    teacher = fewstep.load_teacher(bases["sd"], device="cpu")
    role = SharedBase(teacher.denoiser, LoraShape(rank=4, alpha=8.0)).add_role("generator")
    path = tmp_path / f"{name}.safetensors"
    write_kohya_lora(path, lora_from_state(role.adapter_state(), 4, 8.0), {})
    said = convert_lora(path, tmp_path / "out", base=str(bases["sd"]))
    assert said.endswith(f"steps {list(steps)} (by its name; --step-indices gives others)")
    assert convert_lora(path, tmp_path / "other", base=str(bases["sd"]), step_indices=(999,)).endswith("steps [999]")


@pytest.mark.parametrize(("folder", "title"), [("lcm-lora-sdv1-5", ""), ("mine", "sdxl turbo lora")])
def test_a_folder_or_a_header_of_another_method(
    bases: dict[str, Path], tmp_path: Path, folder: str, title: str
) -> None:
    """A neutral file name does not make it ours."""
    teacher = fewstep.load_teacher(bases["sd"], device="cpu")
    role = SharedBase(teacher.denoiser, LoraShape(rank=4, alpha=8.0)).add_role("generator")
    path = tmp_path / folder / "4step_lora.safetensors"
    path.parent.mkdir()
    write_kohya_lora(path, lora_from_state(role.adapter_state(), 4, 8.0), {"modelspec.title": title} if title else {})
    said = f"by its name it is a {'turbo' if title else 'lcm'} file"
    refused(path, tmp_path / "out", "give --step-indices", said, base=bases["sd"])


def test_a_networks_own_folder(bases: dict[str, Path], tmp_path: Path) -> None:
    """As `unet.save_pretrained` leaves it: its config is the base's, or the network computes otherwise there."""
    folder = shutil.copytree(bases["sd"] / "unet", tmp_path / "unet")
    config = json.loads((folder / "config.json").read_text())

    def write(**changes: Any) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    write(sample_size=64, dropout=0.1, upcast_attention=None, attention_head_dim=[2, 2])
    convert(folder, tmp_path / "out", bases["sd"], step_indices="999")
    found = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    assert all(
        torch.equal(found[key], value)
        for key, value in load_file(folder / "diffusion_pytorch_model.safetensors").items()
    )
    file = folder / "diffusion_pytorch_model.safetensors"
    for changes, said in (
        ({"flip_sin_to_cos": False}, "says flip_sin_to_cos=False, that of the base True"),
        ({"time_cond_proj_dim": 32}, "says time_cond_proj_dim=32, that of the base None"),
        ({"attention_type": "gated"}, "its unet has attention_type='gated'"),
        ({"of_tomorrow": 1}, "its unet has of_tomorrow=1"),
    ):
        write(**changes)
        for source in (folder, file):
            refused(source, tmp_path / "none", said, base=bases["sd"], step_indices="999")
    file.rename(folder / "diffusion_pytorch_model-00001-of-00002.safetensors")
    refused(folder, tmp_path / "none", "holds its weights in 1 parts", base=bases["sd"], step_indices="999")


def test_a_lora_of_another_prediction(bases: dict[str, Path], tmp_path: Path) -> None:
    """sd-scripts and our own exports say in the header what it was trained for."""
    teacher = fewstep.load_teacher(bases["sd"], device="cpu")
    role = SharedBase(teacher.denoiser, LoraShape(rank=4, alpha=8.0)).add_role("generator")
    path, lora = tmp_path / "dmd2_4step.safetensors", lora_from_state(role.adapter_state(), 4, 8.0)
    for header in ({"modelspec.prediction_type": "v"}, {"ss_v_parameterization": "True"}):
        write_kohya_lora(path, lora, header)
        refused(
            path, tmp_path / "out", "made for a model of v-prediction", "scheduler here says epsilon", base=bases["sd"]
        )
    write_kohya_lora(path, lora, {"modelspec.prediction_type": "epsilon", "ss_v_parameterization": "False"})
    convert(path, tmp_path / "out", bases["sd"])


def test_a_gguf_file_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "dmd2_4step.gguf").write_bytes(b"GGUF" + bytes(100))
    refused(
        tmp_path / "dmd2_4step.gguf",
        tmp_path / "out",
        "is a GGUF file, which holds quantised weights",
        base=bases["sd"],
    )


def test_a_network_that_predicts_x0_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "sdxl_lightning_1step_unet_x0.safetensors"
    save_file(unet_of(bases["sdxl"], 1).network.state_dict(), path)
    refused(path, tmp_path / "out", "predicts x0 itself", base=bases["sdxl"], step_indices="999")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_read_by_casting(bases: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    state = unet_of(bases["sdxl"], 1).network.state_dict()
    small = {key: value.to(dtype) if value.ndim > 1 else value.half() for key, value in state.items()}
    save_file(small, tmp_path / "dmd2_4step_fp8.safetensors")
    convert(tmp_path / "dmd2_4step_fp8.safetensors", tmp_path / "out", bases["sdxl"])
    found = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.float16}
    assert all(torch.equal(found[key].float(), value.float()) for key, value in small.items())


def test_quantised_files_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    state = unet_of(bases["sdxl"], 1).network.state_dict()
    save_file(
        {k: (v * 9).to(torch.int8) if v.ndim > 1 else v for k, v in state.items()}, tmp_path / "dmd2_4step.safetensors"
    )
    refused(tmp_path / "dmd2_4step.safetensors", tmp_path / "out", "is stored as int8", base=bases["sdxl"])


def refused(source: Path, out: Path, *messages: str, base: str | Path = "", step_indices: str = "") -> None:
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        convert(source, out, base, step_indices)
    assert all(message in str(caught.value) for message in messages), caught.value
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.iterdir()) == before


@pytest.fixture
def edm_bin(tmp_path: Path) -> Path:
    torch.save(edm_network(0).state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin"


def test_refuses_sources_with_nothing_to_convert(tmp_path: Path, bases: dict[str, Path], teacher_folder: Path) -> None:
    out = tmp_path / "out"
    refused(tmp_path / "nowhere", out, "does not exist")
    refused(tmp_path, out, "is a folder without weights")
    refused(teacher_folder, out, "is a fewstep model already")
    refused(bases["sd"], out, "is a diffusers folder: use it as a teacher directly")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", out, "starts neither like a zip archive")
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04]\x94.")
    refused(tmp_path / "x.pkl", out, "no 'ema' network")


def test_refuses_an_output_that_exists(tmp_path: Path, edm_bin: Path) -> None:
    (tmp_path / "out").mkdir()
    refused(edm_bin, tmp_path / "out", "exists already; choose another output folder")
    refused(edm_bin, edm_bin, "exists already")
    assert list((tmp_path / "out").iterdir()) == []


def test_refuses_weights_without_their_base(tmp_path: Path, bases: dict[str, Path]) -> None:
    path = tmp_path / "dmd2_sdxl_4step_unet_fp16.bin"
    torch.save(unet_of(bases["sdxl"], 1).network.state_dict(), path)
    refused(path, tmp_path / "out", "give its base model (diffusers folder or hub id) as --base")
    refused(
        path,
        tmp_path / "out",
        "its generator is another network than expected",
        "network.add_embedding",
        base=bases["sd"],
    )
    path.rename(tmp_path / "unet.bin")
    refused(
        tmp_path / "unet.bin", tmp_path / "out", "give --step-indices, 999,749,499,249 for DMD2's four steps, 399",
        base=bases["sdxl"],
    )  # fmt: skip


def test_refuses_a_lora_for_another_base(tmp_path: Path, bases: dict[str, Path]) -> None:
    teacher = fewstep.load_teacher(bases["sdxl"], device="cpu")
    role = SharedBase(teacher.denoiser, LoraShape(rank=4, alpha=8.0)).add_role("generator")
    lora = lora_from_state(role.adapter_state(), 4, 8.0)
    write_kohya_lora(tmp_path / "dmd2_4step_lora.safetensors", lora, {})
    refused(tmp_path / "dmd2_4step_lora.safetensors", tmp_path / "out", "is a LoRA for another base", base=bases["sd"])
    tensors = load_file(tmp_path / "dmd2_4step_lora.safetensors")
    name = next(name for name in tensors if "to_q" in name and name.endswith("lora_down.weight"))
    save_file({**tensors, name: torch.ones(4, 999)}, tmp_path / "dmd2_4step_wide.safetensors")
    refused(
        tmp_path / "dmd2_4step_wide.safetensors", tmp_path / "out", "is a LoRA for another base: 1 of its", "to_q",
        base=bases["sdxl"],
    )  # fmt: skip
    save_file({**tensors, name: tensors[name] / 0}, tmp_path / "dmd2_4step_inf.safetensors")
    refused(tmp_path / "dmd2_4step_inf.safetensors", tmp_path / "out", "infinite or NaN", "to_q", base=bases["sdxl"])


@pytest.mark.parametrize(
    ("step_indices", "message"),
    [("999,abc", "give whole numbers"), ("1000", "lie outside 0..999"), ("249,999", "must fall strictly")],
)
def test_refuses_other_steps(tmp_path: Path, edm_bin: Path, step_indices: str, message: str) -> None:
    refused(edm_bin, tmp_path / "out", message, step_indices=step_indices)


def test_a_teacher_has_no_steps(tmp_path: Path) -> None:
    network = edm_network(0)
    write_edm_pickle(tmp_path / "edm.pkl", network.state_dict(), edm_arguments(network.config))
    refused(tmp_path / "edm.pkl", tmp_path / "out", "has no step schedule", step_indices="999")


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda s: {k: v for k, v in s.items() if "out_conv" not in k}, ("2 missing (e.g. model.out_conv",)),
        (lambda s: {**s, "model.surprise.weight": torch.ones(1)}, ("1 unexpected (model.surprise.weight)",)),
        (lambda s: {**s, "model.out_norm.weight": torch.ones(3)}, ("1 of another shape (model.out_norm.weight (3,) for (16,))",)),
        (lambda s: {**s, "model.enc.16x16_conv.weight": torch.ones(2**20, 0, 3, 3)}, ("are empty", "--base")),
        (lambda s: {**s, "model.map_layer0.weight": torch.ones(0, 2**35)}, ("--base",)),
        (lambda s: {k: v for k, v in s.items() if ".enc." not in k}, ("no EDM network this library knows", "--base")),
        (lambda s: {k.replace("16x16", "99999x99999"): v for k, v in s.items()}, ("works at the resolutions", "--base")),
    ],
)  # fmt: skip
def test_refuses_other_edm_networks(tmp_path: Path, edm_bin: Path, change: Any, messages: tuple[str, ...]) -> None:
    torch.save(change(edm_network(0).state_dict()), edm_bin)
    refused(edm_bin, tmp_path / "out", *messages)


def test_refuses_a_base_of_another_shape(tmp_path: Path, edm_bin: Path, teacher_folder: Path) -> None:
    refused(edm_bin, tmp_path / "out", "another network than expected", base=teacher_folder)
    refused(edm_bin, tmp_path / "out", "nowhere does not exist", base=tmp_path / "nowhere")


def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The roles are written last; the generator that was complete by then disappears with them."""
    import fewstep.formats.roles_folder as roles_folder

    source = save_dmd2(tmp_path / "t_checkpoint_model_1", edm_network(0), edm_network(1), head_for(edm_network(1)))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(roles_folder, "write_tensor_file", full)
        refused(source, tmp_path / "out", f"cannot write {tmp_path / 'out'}: [Errno 28] No space left", "half-written")
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.formats.model_folder.write_tensor_file", full)
        refused(source, tmp_path / "out", f"cannot write {tmp_path / 'out'}: [Errno 28] No space left", "half-written")
    convert(source, tmp_path / "out")


def test_command_line(tmp_path: Path, edm_bin: Path) -> None:
    """Exit codes and messages as a user meets them."""
    command = [sys.executable, "-c", "from fewstep.cli.main import main; main()", "convert", str(edm_bin)]
    done = subprocess.run(
        [*command, str(tmp_path / "out"), "--step-indices", "999"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0
    assert all(line.endswith(" ...") for line in done.stderr.splitlines())  # what takes a while on a busy machine
    assert done.stdout == f"{tmp_path / 'out'}: generator, 3x16x16 pictures, 4 classes, steps [999]\n"
    assert (tmp_path / "out/unet/diffusion_pytorch_model.safetensors").is_file()
    failed = fewstep_command("convert", edm_bin, tmp_path / "out")
    assert failed.code == 2
    assert failed.err.splitlines()[-1] == (
        f"fewstep: {tmp_path / 'out'} exists already; choose another output folder, or remove it first"
    )


def test_suffixes_in_any_case(tmp_path: Path) -> None:
    network = edm_network(0, "adm")
    write_edm_pickle(tmp_path / "EDM.PKL", network.state_dict(), edm_arguments(network.config))
    convert(tmp_path / "EDM.PKL", tmp_path / "out")
    fewstep.load_teacher(tmp_path / "EDM.PKL", device="cpu")
    assert Source.parse("some/UNet.SAFETENSORS").hub_id == ""
