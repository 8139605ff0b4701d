"""LoRAs that users bring, merged: the network computes what it computes under the same LoRA beside it, in every spelling."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.families.registry import family_of
from fewstep.formats.kohya_lora import LoraWeights, lora_from_state, write_kohya_lora, write_peft_lora
from fewstep.formats.lora_list import LoraFile, loras_fingerprint
from fewstep.models.load import load_model, load_teacher
from fewstep.networks.adapters import LoraShape, SharedBase
from fewstep.networks.merged_loras import merge_loras, read_loras
from tests.export.text_generators import FOLDERS, PROMPTS, moved, write_run

SPELLINGS = ("kohya", "diffusers", "peft")
TARGETS = {"sd": ("to_q", "to_out.0", "conv1", "proj_in"), "z-image": ("to_v", "to_out.0", "feed_forward.w2")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {family: FOLDERS[family](place / family) for family in TARGETS}


def user_lora(network: Denoiser, family: str, seed: int = 0) -> LoraWeights:
    """A LoRA of rank 3 and alpha 1.5, as a trainer leaves it; the network has it beside its layers from then on."""
    torch.manual_seed(seed)
    role = SharedBase(network, LoraShape(3, 1.5, TARGETS[family])).add_role("mine")
    return lora_from_state(moved(role, 0.3).adapter_state(), 3, 1.5)  # type: ignore[attr-defined]


def written(path: Path, lora: LoraWeights, spelling: str, component: str) -> Path:
    if spelling == "kohya":
        write_kohya_lora(path, lora, {})
        return path
    write_peft_lora(path, lora, component, {})
    if spelling == "peft":
        prefix = f"{component}."
        save_file({f"base_model.model.{name.removeprefix(prefix)}": v for name, v in load_file(path).items()}, path)
    return path


def x0_of(network: Denoiser) -> torch.Tensor:
    family = family_of(network.base_network.describe())
    torch.manual_seed(0)
    condition = family.example_condition(network.base_network, 2)
    for part in condition.parts.values():
        if part.is_floating_point():
            part.normal_()
    level = network.noise_schedule.expanded(700, 2, torch.device("cpu"))
    with torch.no_grad():
        return network.denoise(torch.randn(2, *network.image_shape), level, condition)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "spelling"),
    [*(("sd", spelling) for spelling in SPELLINGS), ("z-image", "kohya"), ("z-image", "diffusers")],
)
def test_merged_is_what_it_is_beside_the_network(
    tmp_path: Path, folders: dict[str, Path], family: str, spelling: str
) -> None:
    """Convolutions too; a strength of 0.5 is half of alpha."""
    adapted: Any = load_teacher(folders[family], device="cpu").denoiser
    lora = user_lora(adapted, family)
    file = written(tmp_path / "style.safetensors", lora, spelling, family_of(adapted.describe()).component)
    shared = SharedBase(load_teacher(folders[family], device="cpu").denoiser, LoraShape(3, 0.75, lora.targets))
    beside = shared.add_role("mine")
    beside.load_adapter_state(lora.state)
    plain, expected = x0_of(shared.base), x0_of(beside)
    teacher = load_teacher(folders[family], device="cpu", loras=[f"{file}:0.5"])
    assert (x0_of(teacher.denoiser) - expected).abs().max() < 1e-4
    assert (expected - plain).abs().max() > 1e-2
    assert teacher.card.base_loras == (f"{file.resolve()}:0.5",)


@pytest.mark.slow
def test_two_add_up_and_one_with_its_negative_is_none(tmp_path: Path, folders: dict[str, Path]) -> None:
    for seed in (0, 1):
        network: Any = load_teacher(folders["sd"], device="cpu").denoiser
        written(tmp_path / f"{seed}.safetensors", user_lora(network, "sd", seed), "kohya", "unet")
    first, second = tmp_path / "0.safetensors", tmp_path / "1.safetensors"

    def weights(*loras: str) -> torch.Tensor:
        network: Any = load_teacher(folders["sd"], device="cpu", loras=loras).denoiser
        return torch.cat([p.flatten() for p in network.parameters()])

    plain = weights()
    both = weights(str(first), f"{second}:0.3")
    torch.testing.assert_close(both - plain, weights(str(first)) + weights(f"{second}:0.3") - 2 * plain)
    torch.testing.assert_close(weights(str(first), f"{first}:-1"), plain)


@pytest.mark.slow
def test_a_lora_of_another_prediction_is_told(
    tmp_path: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    network: Any = load_teacher(folders["sd"], device="cpu").denoiser
    file = written(tmp_path / "style.safetensors", user_lora(network, "sd"), "kohya", "unet")
    for header, told in (
        ({}, False),
        ({"ss_v_parameterization": "True"}, True),
        ({"modelspec.predict_key": "eps"}, False),
    ):
        save_file(load_file(file), file, header)
        load_teacher(folders["sd"], device="cpu", loras=[str(file)])
        said = capsys.readouterr().err
        assert (f"warning: LoRA {file} was made on a model of v-prediction" in said) == told, said


def refused(folder: Path, *loras: str) -> str:
    with pytest.raises(UserError) as error:
        load_teacher(folder, device="cpu", loras=loras)
    return str(error.value)


@pytest.mark.slow
def test_what_is_no_lora_of_this_network_is_one_sentence(tmp_path: Path, folders: dict[str, Path]) -> None:
    networks = {family: load_teacher(folder, device="cpu").denoiser for family, folder in folders.items()}
    lora: Any = user_lora(networks["sd"], "sd")
    theirs = written(tmp_path / "z.safetensors", user_lora(networks["z-image"], "z-image"), "kohya", "transformer")
    assert "is a LoRA for another base: " in refused(folders["sd"], str(theirs))
    file = written(tmp_path / "a.safetensors", lora, "kohya", "unet")
    tensors = load_file(file)
    name = next(name for name in tensors if "to_q.lora_down" in name)
    save_file({**tensors, "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(1, 8)}, file)
    assert "(LoRA of a text encoder: not supported)" in refused(folders["sd"], str(file))
    save_file({**tensors, name: torch.ones(3, tensors[name].shape[1] + 1)}, file)
    assert re_one(refused(folders["sd"], str(file)), "is for another base: its layer network.", ", this network's (")
    save_file({**tensors, name: tensors[name] * float("nan")}, file)
    assert "are infinite or NaN" in refused(folders["sd"], str(file))
    save_file({**tensors, name: (tensors[name] * 9).to(torch.int8)}, file)
    assert "is stored as int8" in refused(folders["sd"], str(file))
    save_file({**tensors, name: tensors[name] > 0}, file)
    assert "is stored as bool" in refused(folders["sd"], str(file))
    assert refused(folders["sd"], "no.safetensors:0.8").startswith("LoRA no.safetensors:0.8: no.safetensors is no file")
    for strength in ("0", "nan", "inf"):
        assert f"a strength of {strength} is none" in refused(folders["sd"], f"{file}:{strength}")


def re_one(text: str, *parts: str) -> bool:
    return all(part in text for part in parts) and "\n" not in text


@pytest.mark.slow
def test_nothing_changes_where_one_of_several_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    network: Any = load_teacher(folders["sd"], device="cpu").denoiser
    lora = user_lora(load_teacher(folders["sd"], device="cpu").denoiser, "sd")
    good = written(tmp_path / "good.safetensors", lora, "kohya", "unet")
    save_file({name: value * float("inf") for name, value in load_file(good).items()}, tmp_path / "bad.safetensors")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    aliases = partial(family_of(network.describe()).layer_aliases, network.describe())
    with pytest.raises(UserError):
        merge_loras(network, read_loras(network, [LoraFile(good), LoraFile(tmp_path / "bad.safetensors")], aliases))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.slow
def test_other_models_take_none(tmp_path: Path, teacher_folder: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    assert "is a class-conditional teacher: LoRAs are merged" in refused(
        teacher_folder, str(tmp_path / "a.safetensors")
    )
    run = write_run(tmp_path)
    with pytest.raises(UserError, match=r"is a generator: LoRAs are merged into teachers; distil with teacher\.loras"):
        load_model(run, device="cpu", loras=[str(tmp_path / "a.safetensors")])


def test_files_are_known_by_content_strength_and_order(tmp_path: Path) -> None:
    for number in range(2):
        save_file({"x": torch.full((2,), float(number))}, tmp_path / f"{number}.safetensors")
    (tmp_path / "with:colon").write_bytes((tmp_path / "0.safetensors").read_bytes())
    first, second = f"{tmp_path / '0.safetensors'}", f"{tmp_path / '1.safetensors'}"
    known = loras_fingerprint([first, second])
    assert (
        known
        == loras_fingerprint([f"{first}:1", f"{second}:1.0"])
        == loras_fingerprint([str(tmp_path / "with:colon"), second])
    )
    others = [[second, first], [first], [first, f"{second}:0.9"], [first, first]]
    assert len({known, *map(loras_fingerprint, others)}) == 5


@pytest.mark.slow
def test_the_teacher_is_the_fine_tune_in_what_compares_networks(tmp_path: Path, folders: dict[str, Path]) -> None:
    lora = user_lora(load_teacher(folders["sd"], device="cpu").denoiser, "sd")
    file = written(tmp_path / "a.safetensors", lora, "kohya", "unet")
    plain, half, whole = (
        load_teacher(folders["sd"], device="cpu", loras=loras) for loras in ([], [f"{file}:0.5"], [str(file)])
    )
    assert len({plain.fingerprint, half.fingerprint, whole.fingerprint}) == 3
    assert load_teacher(folders["sd"], device="cpu").fingerprint == plain.fingerprint
    pictures = [
        model.sample(PROMPTS, num_inference_steps=2, output="tensor", progress=False) for model in (plain, half)
    ]
    assert (pictures[0] - pictures[1]).abs().max() > 0.02
