"""Loading models from every kind of path, and images that depend on nothing but seed, number and label."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.devices import choose_device
from fewstep.diffusion import samplers
from fewstep.diffusion.condition import Condition
from fewstep.diffusion.draws import Draws
from fewstep.errors import UserError
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.families.edm.folder import describe_edm_arguments
from fewstep.families.edm.unet import EDMUNetConfig
from fewstep.formats.bundled import bundled_path
from fewstep.formats.edm_pickle_writer import write_edm_pickle
from fewstep.formats.model_folder import ModelCard, write_model_folder
from fewstep.models import model as generator_module
from fewstep.models.load import load_generator, load_model, load_teacher
from fewstep.models.model import Model, build_model
from tests.conftest import golden_denoiser, tiny_denoiser

FOUR_STEPS = (999, 749, 499, 249)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def write(folder: Path, denoiser: EDMDenoiser, card: ModelCard) -> Path:
    write_model_folder(folder, denoiser.describe(), denoiser.state_dict(), card)
    return folder


def make_generator(indices: tuple[int, ...] = (999,), **options: Any) -> Model:
    return build_model(tiny_denoiser(**options), ModelCard("generator", step_indices=indices))


def make_teacher(**options: Any) -> Model:
    return build_model(tiny_denoiser(**options), ModelCard("teacher", can_be_guided=True))


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model", tiny_denoiser(seed=5), ModelCard("generator", step_indices=FOUR_STEPS))


# --- Sampling


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options"),
    [(make_generator(), {}), (make_generator(FOUR_STEPS), {}), (make_teacher(), {"num_inference_steps": 3})],
    ids=["one step", "four steps", "teacher"],
)
def test_images_do_not_depend_on_the_batch(model: Any, options: dict[str, Any]) -> None:
    """Image i of a seed is the same alone, in any batch, and in any part of the set."""
    whole = model.sample(7, seed=3, batch_size=64, **options, output="tensor")
    assert whole.shape == (7, 1, 16, 16)
    assert (whole.dtype, whole.device.type) == (torch.float32, "cpu")
    assert whole.min() >= -1
    assert whole.max() <= 1
    for batch_size in (1, 2, 5):
        torch.testing.assert_close(
            model.sample(7, seed=3, batch_size=batch_size, **options, output="tensor"), whole, atol=1e-3, rtol=0
        )
    parts = torch.cat(
        [
            model.sample(3, seed=3, **options, output="tensor"),
            model.sample(4, seed=3, first=3, **options, output="tensor"),
        ]
    )
    torch.testing.assert_close(parts, whole, atol=1e-3, rtol=0)
    assert not torch.allclose(whole[0], whole[4], atol=1e-2)  # same label, another number
    assert not torch.allclose(model.sample(7, seed=4, **options, output="tensor"), whole, atol=1e-2)


def test_classes_take_turns_from_the_first_image_on() -> None:
    model = make_generator()
    expected = model.sample(6, labels=[0, 1, 2, 3, 0, 1], seed=2, output="tensor")
    torch.testing.assert_close(model.sample(6, seed=2, output="tensor"), expected)
    torch.testing.assert_close(model.sample(3, seed=2, first=3, output="tensor"), expected[3:], atol=1e-3, rtol=0)


def test_label_changes_the_image_and_not_the_noise() -> None:
    model = make_generator()
    images = torch.cat([model.sample(1, labels=[label], seed=2, output="tensor") for label in range(4)])
    assert len(images.flatten(1).unique(dim=0)) == 4
    free = make_generator(num_classes=0)
    assert torch.equal(free.sample(2, seed=1, output="tensor"), free.sample(2, labels=[0, 0], seed=1, output="tensor"))


def test_one_step_from_the_definition() -> None:
    """x0 = D(80 z; 80), with the draws of (seed, number)."""
    model = make_generator()
    noise = Draws.of_batch(9, 0, 3).normal("sample_noise", (1, 16, 16))
    condition = Condition.from_labels(torch.tensor([2, 0, 1]), 4)
    with torch.no_grad():
        expected = model.denoiser.denoise(80 * noise, torch.full((3,), 80.0), condition).clamp(-1, 1)
    torch.testing.assert_close(model.sample(3, labels=[2, 0, 1], seed=9, output="tensor"), expected)
    assert model.evaluations() == 1


def test_four_steps_from_the_definition() -> None:
    """Each step's x0 is noised to the next level with fresh noise; the last x0 is the image."""
    model = make_generator(FOUR_STEPS)
    condition = Condition.from_labels(torch.tensor([0, 1]), 4)
    grid = model.denoiser.noise_schedule.grid
    x0 = torch.zeros(2, 1, 16, 16)
    for number, index in enumerate(FOUR_STEPS):
        noise = Draws.of_batch(9, number, 2).normal("sample_noise", (1, 16, 16))
        with torch.no_grad():
            x0 = model.denoiser.denoise(x0 * (number > 0) + grid[index] * noise, grid[index].expand(2), condition)
    torch.testing.assert_close(model.sample(2, seed=9, output="tensor"), x0.clamp(-1, 1))
    assert model.evaluations() == 4


def test_a_teacher_in_one_step_from_the_definition() -> None:
    """The only step goes from the noisiest level to 0: the teacher's estimate at sigma 80."""
    model = make_teacher()
    noise = Draws.of_batch(9, 0, 3).normal("sample_noise", (1, 16, 16))
    condition = Condition.from_labels(torch.tensor([0, 1, 2]), 4)
    with torch.no_grad():
        expected = model.denoiser.denoise(80 * noise, torch.full((3,), 80.0), condition).clamp(-1, 1)
    torch.testing.assert_close(
        model.sample(3, seed=9, num_inference_steps=1, output="tensor"), expected, atol=1e-4, rtol=0
    )


def test_teacher_and_generator_start_from_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    original = samplers.sample_noise

    def watch(*arguments: Any, **options: Any) -> Tensor:
        seen.append(original(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(generator_module, "sample_noise", watch)
    monkeypatch.setattr(samplers, "sample_noise", watch)
    make_teacher().sample(3, seed=6, num_inference_steps=1, output="tensor")
    teachers = seen[0]
    seen.clear()
    make_generator().sample(3, seed=6, output="tensor")
    assert torch.equal(teachers, seen[-1])


@pytest.mark.slow
def test_teacher_evaluations_are_counted() -> None:
    model = make_teacher()
    calls: list[int] = []
    model.denoiser.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    model.sample(2, num_inference_steps=18, output="tensor")
    assert len(calls) == model.evaluations() == 35
    calls.clear()
    model.sample(2, num_inference_steps=4, guidance_scale=2.0, output="tensor")
    assert (len(calls), set(calls)) == (model.evaluations(4), {4})  # both branches in one forward


def test_no_image_at_all() -> None:
    assert make_generator().sample(0, output="tensor").shape == (0, 1, 16, 16)


@pytest.mark.parametrize(
    ("labels", "message"), [([0, 1], "2 labels for 3 images"), ([0, 4, 1], "4 classes"), ([0, -1, 1], "4 classes")]
)
def test_labels_that_do_not_fit(labels: list[int], message: str) -> None:
    for model in (make_generator(), make_teacher()):
        with pytest.raises(UserError, match=message):
            model.sample(3, labels=labels, output="tensor")


@pytest.mark.parametrize("scale", ["4", "x", float("nan"), float("inf")])
def test_guidance_is_a_finite_number(scale: Any) -> None:
    """NaN made a picture without a word, a text a TypeError."""
    with pytest.raises(UserError, match=r"guidance_scale=.*: give a finite number; 1 is off"):
        make_teacher().sample(1, guidance_scale=scale, output="tensor")


def test_guidance() -> None:
    build_model(tiny_denoiser(), ModelCard("teacher")).check_guidance(1.0)
    make_teacher().check_guidance(2.0)
    with pytest.raises(
        UserError, match=r"guidance_scale=2\.0: this teacher was trained without label dropout .*label_dropout=0\.1"
    ):
        build_model(tiny_denoiser(), ModelCard("teacher")).sample(1, guidance_scale=2.0, output="tensor")
    with pytest.raises(UserError, match=r"guidance_scale=0\.5: this teacher has no condition to guide; use 1"):
        make_teacher(num_classes=0).sample(1, guidance_scale=0.5, output="tensor")


# --- Folders


def test_generator_folder_round_trip(model_folder: Path) -> None:
    expected = build_model(tiny_denoiser(seed=5), ModelCard("generator", step_indices=FOUR_STEPS)).sample(
        3, seed=1, output="tensor"
    )
    for path in (model_folder, str(model_folder)):
        loaded = load_generator(path, device="cpu")
        assert loaded.card == ModelCard("generator", step_indices=FOUR_STEPS)
        assert loaded.step_schedule.indices == FOUR_STEPS
        assert not loaded.denoiser.training
        assert torch.equal(loaded.sample(3, seed=1, output="tensor"), expected)


def test_card_round_trip(tmp_path: Path) -> None:
    card = ModelCard(
        "generator", (999, 499), 1000, ("cat", "dog"), made_with={"num_steps": 3, "settings": {"a": [1]}}, licence="MIT"
    )
    assert load_generator(write(tmp_path / "model", tiny_denoiser(), card), device="cpu").card == card


@pytest.mark.slow
def test_run_folders_hold_their_models(tmp_path: Path) -> None:
    write(tmp_path / "pretraining/teacher", tiny_denoiser(seed=1), ModelCard("teacher"))
    write(tmp_path / "training/generator", tiny_denoiser(seed=2), ModelCard("generator", (999,)))
    teacher, generator = load_teacher(tmp_path / "pretraining"), load_generator(tmp_path / "training")
    assert_other_weights(teacher, generator)
    assert not load_model(tmp_path / "pretraining").is_generator
    assert load_model(tmp_path / "training").is_generator
    shutil.copytree(tmp_path / "training/generator", tmp_path / "pretraining/generator")
    assert load_model(tmp_path / "pretraining").is_generator
    assert not load_teacher(tmp_path / "pretraining").is_generator


def assert_other_weights(a: Model | Model, b: Model | Model) -> None:
    name = "model.map_label.weight"
    assert not torch.equal(a.denoiser.state_dict()[name], b.denoiser.state_dict()[name])


def test_load_model_takes_the_kind_from_the_folder(model_folder: Path, teacher_folder: Path) -> None:
    assert load_model(model_folder, device="cpu").is_generator
    assert not load_model(teacher_folder, device="cpu").is_generator


def test_a_home_folder_is_found(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model_folder.parent))
    assert load_generator("~/model", device="cpu").evaluations() == 4
    assert load_model("~/model", device="cpu").is_generator


def test_half_precision_weights_are_read_as_float32(tmp_path: Path) -> None:
    denoiser = tiny_denoiser()
    write_model_folder(
        tmp_path / "model", denoiser.describe(), denoiser.state_dict(), ModelCard("teacher"), dtype=torch.float16
    )
    assert load_file(tmp_path / "model" / WEIGHTS)["model.map_layer0.weight"].dtype == torch.float16
    loaded = load_teacher(tmp_path / "model", device="cpu")
    assert {parameter.dtype for parameter in loaded.denoiser.parameters()} == {torch.float32}


def test_bf16_is_close_to_fp32(tmp_path: Path) -> None:
    """bf16 inside the network only: images and their type stay float32."""
    folder = write(tmp_path / "model", tiny_denoiser(), ModelCard("generator", (999,)))
    exact, half = load_generator(folder, device="cpu"), load_generator(folder, device="cpu", precision="bf16")
    assert half.denoiser.compute_dtype == torch.bfloat16
    a, b = exact.sample(8, seed=1, output="tensor"), half.sample(8, seed=1, output="tensor")
    assert b.dtype == torch.float32
    assert not torch.equal(a, b)
    assert (a - b).abs().mean() < 0.02 * a.std()
    assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


# --- EDM pickles


def as_arguments(config: EDMUNetConfig) -> dict[str, Any]:
    """How an EDM checkpoint describes the same network."""
    values = config.to_dict()
    family = {"adm": "DhariwalUNet", "song": "SongUNet"}[values.pop("family")]
    assert values.pop("fold") == 1
    return {**values, "model_type": family, "use_fp16": False, "sigma_data": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["adm", "ddpmpp", "ncsnpp"])
def test_edm_pickle_gives_the_same_images(tmp_path: Path, family: str) -> None:
    denoiser, _ = golden_denoiser(family)
    path = tmp_path / "edm-teacher.pkl"
    write_edm_pickle(path, denoiser.state_dict(), as_arguments(denoiser.config))
    loaded = load_teacher(path, device="cpu")
    assert not load_model(path, device="cpu").is_generator
    assert loaded.denoiser.describe() == denoiser.describe()
    assert loaded.card == ModelCard("teacher")
    expected = build_model(denoiser, ModelCard("teacher")).sample(2, seed=3, num_inference_steps=3, output="tensor")
    assert expected.std() > 0.1
    assert torch.equal(loaded.sample(2, seed=3, num_inference_steps=3, output="tensor"), expected)


def test_released_arguments_that_only_say_what_is_special(tmp_path: Path) -> None:
    """The ImageNet-64 file names resolution, channels and classes; the rest is the family's default."""
    description = describe_edm_arguments(
        {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "use_fp16": True, "model_type": "DhariwalUNet"}
    )
    config = EDMUNetConfig.from_dict(description["network"])
    assert (config.model_channels, config.channel_mult, config.num_blocks) == (192, (1, 2, 3, 4), 3)
    assert (config.attn_resolutions, config.channel_mult_emb) == ((32, 16, 8), 4)
    assert description["sigma_data"] == 0.5


@pytest.mark.parametrize("arguments", [{"model_type": "UViT"}, {"model_type": "SongUNet", "encoder_type": "skip"}])
def test_network_families_this_library_does_not_have(tmp_path: Path, arguments: dict[str, Any]) -> None:
    denoiser, _ = golden_denoiser("ddpmpp")
    write_edm_pickle(tmp_path / "a.pkl", denoiser.state_dict(), {**as_arguments(denoiser.config), **arguments})
    with pytest.raises(UserError, match=r"EDM network .* is not supported"):
        load_teacher(tmp_path / "a.pkl")


@pytest.mark.parametrize("class_name", ["VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_other_preconditionings_are_refused(tmp_path: Path, class_name: str) -> None:
    denoiser, _ = golden_denoiser("ddpmpp")
    write_edm_pickle(tmp_path / "a.pkl", denoiser.state_dict(), as_arguments(denoiser.config), class_name)
    with pytest.raises(UserError, match=class_name):
        load_teacher(tmp_path / "a.pkl")


# --- What is no model


def refused(path: Path | str, load: Any = load_teacher) -> str:
    with pytest.raises(UserError) as error:
        load(path, device="cpu")
    return str(error.value)


@pytest.mark.parametrize("load", [load_teacher, load_generator, load_model])
def test_nothing_there(tmp_path: Path, load: Any) -> None:
    message = refused(tmp_path / "nothing", load)
    assert f"{tmp_path / 'nothing'} does not exist; give a model folder, a run folder or an EDM .pkl" in message


def test_a_teacher_is_no_generator(teacher_folder: Path) -> None:
    message = refused(teacher_folder, load_generator)
    assert message == f"{teacher_folder} is a teacher without a step schedule; load it with fewstep.load_teacher"


@pytest.mark.parametrize("name", ["unet/config.json", "fewstep.json", WEIGHTS])
def test_a_file_is_missing(model_folder: Path, name: str) -> None:
    (model_folder / name).unlink()
    assert refused(model_folder) == f"{model_folder} is not a fewstep model: {name} is missing"


def test_numbers_that_are_none(model_folder: Path) -> None:
    path = model_folder / WEIGHTS
    weights = load_file(path)
    name = max(weights)
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, path)
    message = refused(model_folder)
    assert message.startswith(f"{model_folder}: 1 of the ")
    assert f"numbers in {name} are infinite or NaN" in message


def test_truncated_weights(model_folder: Path) -> None:
    path = model_folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    message = refused(model_folder)
    assert message.startswith(f"{path} cannot be read (")
    assert message.endswith("; copy or export the model again")


@pytest.mark.parametrize("name", ["unet/config.json", "fewstep.json"])
@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", "[" * 100_000, '{"a":' * 100_000])
def test_damaged_descriptions(model_folder: Path, name: str, text: str) -> None:
    (model_folder / name).write_text(text)
    assert refused(model_folder).startswith(f"{model_folder / name} is damaged")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step_indices", 3), ("step_indices", ["a"]), ("step_indices", [1000]), ("step_indices", [True]), ("num_levels", "x"),
        ("num_levels", 10**12), ("num_levels", 0), ("class_names", 3), ("class_names", [1]), ("can_be_guided", 1),
        ("made_with", []), ("licence", None), ("base", 5), ("role", 1), ("other", 1),
    ],
)  # fmt: skip
def test_entries_of_another_kind_are_named(model_folder: Path, key: str, value: object) -> None:
    path = model_folder / "fewstep.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    message = refused(model_folder)
    assert message.startswith(f"{path} is damaged")
    assert key in message


def test_weights_of_another_network(model_folder: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", tiny_denoiser(channels=3), ModelCard("generator", (999,)))
    shutil.copy(other / WEIGHTS, model_folder / WEIGHTS)
    message = refused(model_folder)
    assert message.startswith(f"{model_folder} holds another network than it describes: of its tensors, ")
    assert "of another shape (e.g. model.enc.8x8_conv.weight" in message


def test_weights_with_other_names(model_folder: Path) -> None:
    path = model_folder / WEIGHTS
    weights = load_file(path)
    weights["model.extra"] = weights.pop("model.map_layer0.bias")
    save_file(weights, path)
    message = refused(model_folder)
    assert "1 missing (model.map_layer0.bias), 1 unexpected (model.extra)" in message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"family": "flux"}, "model family 'flux' is unknown"),
        ({"network": {}}, "the description of the network is wrong"),
        ({"network": {"family": "adm", "img_resolution": 16, "img_channels": 1, "depth": 3}}, "unknown network settings ['depth']"),
        ({"network": {"family": "adm", "img_resolution": 18, "img_channels": 1}}, "must be a multiple of"),
    ],
)  # fmt: skip
def test_descriptions_of_no_network(model_folder: Path, change: dict[str, Any], told: str) -> None:
    path = model_folder / "unet/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "description": {**config["description"], **change}}))
    assert told in refused(model_folder)


def test_files_that_are_no_pickles_of_edm(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Marker:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return Path.touch, (marker,)

    contents = {
        "garbage.pkl": b"\x00\x01garbage", "empty.pkl": b"", "text.pkl": b"hello world",
        "trap.pkl": pickle.dumps({"ema": Marker()}), "other.pkl": pickle.dumps({"weights": [1, 2]}),
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert refused(tmp_path / name).startswith(f"{tmp_path / name}: not a readable EDM checkpoint")
        assert not marker.exists()
    torch.save({"model": torch.ones(2)}, tmp_path / "model.pth")
    assert "model.pth is neither a model folder nor an EDM .pkl; `fewstep convert`" in refused(tmp_path / "model.pth")


def test_a_truncated_edm_pickle(tmp_path: Path) -> None:
    denoiser, _ = golden_denoiser("adm")
    write_edm_pickle(tmp_path / "a.pkl", denoiser.state_dict(), as_arguments(denoiser.config))
    content = (tmp_path / "a.pkl").read_bytes()
    for length in (len(content) // 2, len(content) - 1):
        (tmp_path / "a.pkl").write_bytes(content[:length])
        assert refused(tmp_path / "a.pkl").startswith(f"{tmp_path / 'a.pkl'}: not a readable EDM checkpoint")


def test_an_edm_pickle_of_other_arguments(tmp_path: Path) -> None:
    denoiser, _ = golden_denoiser("adm")
    arguments = {**as_arguments(denoiser.config), "model_channels": 2 * denoiser.config.model_channels}
    write_edm_pickle(tmp_path / "a.pkl", denoiser.state_dict(), arguments)
    assert refused(tmp_path / "a.pkl").startswith(f"{tmp_path / 'a.pkl'} holds another network than it describes")


def test_nothing_of_this_name_ships() -> None:
    with pytest.raises(
        UserError, match=r"bundled:imagenet does not ship with this version; .*bundled:fashion-mnist do"
    ):
        bundled_path("imagenet")
    assert "bundled:imagenet does not ship" in refused("bundled:imagenet", load_model)


# --- Devices


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match=r"compute\.device='gpu' is not a device; use auto, cpu, cuda, cuda:N or mps"):
        choose_device("gpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UserError, match=rf"compute\.device='{name}': this machine has no usable CUDA device; use cpu or auto"
    ):
        choose_device(name)


@pytest.mark.parametrize("name", ["mps", "xpu", "meta"])
def test_devices_that_are_not_offered(name: str) -> None:
    with pytest.raises(UserError, match=rf"compute\.device='{name}'"):
        choose_device(name)


def test_unknown_precision(model_folder: Path) -> None:
    with pytest.raises(UserError, match="fp8"):
        load_generator(model_folder, device="cpu", precision="fp8")


def test_numbers_of_numpy_and_torch_are_numbers_and_others_are_refused(teacher_folder: Path) -> None:
    teacher = load_teacher(teacher_folder, device="cpu")

    def made(**options: Any) -> torch.Tensor:
        return teacher.sample(num_inference_steps=1, output="tensor", progress=False, **options)

    plain = made(labels=[1, 2], seed=3)
    for labels, seed in ((np.array([1, 2]), np.int64(3)), (torch.tensor([1, 2]), torch.tensor(3))):
        assert torch.equal(made(labels=labels, seed=seed), plain)
    for options, told in (
        ({"seed": 1.5}, "seed=1.5: a seed is a whole number"), ({"seed": None}, "seed=None: a seed is"),
        ({"labels": 3}, r"give a list of class numbers, e\.g\. labels=\[3\]"), ({"num_images": -1}, "num_images=-1: give a whole"),
        ({"num_images": 2.5}, "num_images=2.5: give a whole number"), ({"first": -1}, "first=-1: give a whole number"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=told):
            made(**options)
    for steps in (2.5, 10**9):
        with pytest.raises(UserError, match="give a whole number from 1 to 1000"):
            teacher.sample(num_inference_steps=steps)  # type: ignore[call-overload]
