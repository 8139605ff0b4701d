"""Single files become diffusers folders; whatever else a user gives is refused in one sentence."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewstep
from fewstep.errors import UserError
from fewstep.export.single_file import single_file_tensors
from fewstep.families.registry import family_named
from fewstep.families.stable_diffusion.schedule import discrete_alphas_cumprod
from fewstep.preparation.conversion import recognise
from fewstep.preparation.convert import convert_weights
from fewstep.preparation.single_file import read_model_file, single_file_to_folder
from tests.export.single_file_models import FOLDERS, load_generator


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {family: make(place / family) for family, make in FOLDERS.items()}


@pytest.fixture(scope="module")
def tensors(folders: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    return {
        family: {key: value.contiguous() for key, value in single_file_tensors(load_generator(folder, 999)).items()}
        for family, folder in folders.items()
    }


def weights_of(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*/*.safetensors"))
    return {f"{path.parent.name}.{key}": value for path in files for key, value in load_file(path).items()}


@pytest.mark.slow
def test_a_config_folder_needs_no_weights(folders: dict[str, Path], tensors: Any, tmp_path: Path) -> None:
    """Half precision stays; extras of published files (position ids, EMA, schedules) are left behind."""
    for path in (base := folders["sd"]).rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            copy = tmp_path / "configs" / path.relative_to(base)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    extras = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
        "model_ema.decay": torch.tensor(0.5), "logvar": torch.ones(3), "scale_factor": torch.tensor(0.18215),
    }  # fmt: skip
    save_file({**{k: v.half() for k, v in tensors["sd"].items()}, **extras}, tmp_path / "m.safetensors")
    made = single_file_to_folder(tmp_path / "m.safetensors", tmp_path / "configs", tmp_path / "out")
    assert all(value.dtype == torch.float16 for value in weights_of(made).values())
    teacher: Any = fewstep.load_teacher(made, device="cpu")
    assert torch.isfinite(teacher.sample(["cat"], num_inference_steps=2, output="tensor")).all()
    assert json.loads((made / "model_index.json").read_text(encoding="utf-8"))["safety_checker"] == [None, None]


@pytest.mark.slow
def test_old_text_keys_are_read(folders: dict[str, Path], tensors: Any, tmp_path: Path) -> None:
    """Some merges leave `text_model.` out of CLIP's keys."""
    old = {key.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."): v for key, v in tensors["sd"].items()}  # fmt: skip
    save_file(old, tmp_path / "old.safetensors")
    save_file(tensors["sd"], tmp_path / "new.safetensors")
    one = single_file_to_folder(tmp_path / "old.safetensors", folders["sd"], tmp_path / "one")
    two = single_file_to_folder(tmp_path / "new.safetensors", folders["sd"], tmp_path / "two")
    first, second = weights_of(one), weights_of(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_headers_prediction_goes_before_the_configs(folders: dict[str, Path], tensors: Any, tmp_path: Path) -> None:
    save_file(tensors["sd"], tmp_path / "v.safetensors", metadata={"modelspec.prediction_type": "v"})
    made = single_file_to_folder(tmp_path / "v.safetensors", folders["sd"], tmp_path / "out")
    config = json.loads((made / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    assert config["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    "header",
    [{"modelspec.predict_key": "v"}, {"ss_v_parameterization": "True"}, {"modelspec.prediction_type": "V_PREDICTION"}],
)
def test_other_tools_words_for_the_prediction(
    folders: dict[str, Path], tensors: Any, tmp_path: Path, header: dict[str, str]
) -> None:
    """ComfyUI writes predict_key, sd-scripts the other two."""
    save_file(tensors["sd"], tmp_path / "v.safetensors", metadata=header)
    assert read_model_file(tmp_path / "v.safetensors").prediction_type == "v_prediction"
    save_file(
        {**tensors["sd"], "v_pred": torch.empty(0)},
        tmp_path / "v.safetensors",
        metadata={"modelspec.predict_key": "epsilon"},
    )
    with pytest.raises(
        UserError, match=r"its tensor v_pred says v-prediction, modelspec\.predict_key in its header says epsilon"
    ):
        read_model_file(tmp_path / "v.safetensors")


def test_the_yaml_beside_a_file_is_read(folders: dict[str, Path], tensors: Any, tmp_path: Path) -> None:
    """By which the LDM code and programs after it know that a fine-tune predicts v."""
    path, config = tmp_path / "furry.safetensors", tmp_path / "furry.yaml"
    save_file(tensors["sd"], path)
    text = 'model:\n  params:\n    parameterization: "v"\n    linear_start: 0.00085\n    linear_end: 0.0120\n    timesteps: 1000\n'
    config.write_text(text)
    made = single_file_to_folder(path, folders["sd"], tmp_path / "out")
    said = json.loads((made / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))["prediction_type"]
    assert said == "v_prediction"
    refused = {
        text.replace('"v"', "x0"): r"furry\.yaml says parameterization='x0'",
        text.replace("0.0120", "0.02"): r"its noise schedule \(alphas_cumprod\) is another than that of the base's",
        text.replace("0.0120", "0.02.0"): r"furry\.yaml has linear_end: 0\.02\.0, not a number",
        text + "    scale_factor: 0.3\n": r"multiplied by 0\.3 \(scale_factor\)",
    }
    for other, message in refused.items():
        config.write_text(other)
        with pytest.raises(UserError, match=message):
            single_file_to_folder(path, folders["sd"], tmp_path / "none")
    save_file(tensors["sd"], path, metadata={"modelspec.prediction_type": "epsilon"})
    config.write_text(text)
    with pytest.raises(UserError, match=r"says epsilon, parameterization in furry\.yaml says v-prediction"):
        read_model_file(path)
    config.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"furry\.yaml, which says how furry\.safetensors was trained, cannot be read"):
        read_model_file(path)


@pytest.mark.parametrize(
    ("name", "header", "said"),
    [
        ("sd_turbo.safetensors", {}, r"of few steps by its name \(turbo in"),
        ("model.safetensors", {"modelspec.title": "RealVisXL V4.0 Lightning"}, r"\(lightning in 'RealVisXL"),
        ("model.safetensors", {"ss_output_name": "mine_dmd2"}, r"\(dmd in 'mine_dmd2'"),
        ("model.safetensors", {"fewstep.step_indices": "[999]"}, "a generator of few steps that fewstep exported"),
    ],
)
def test_a_distilled_file_becomes_no_teacher(
    folders: dict[str, Path], tensors: Any, tmp_path: Path, name: str, header: dict[str, str], said: str
) -> None:
    save_file(tensors["sd"], tmp_path / name, metadata=header)
    with pytest.raises(UserError, match=said):
        convert_weights(tmp_path / name, tmp_path / "out", base=str(folders["sd"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["m.sft", "m.ckpt", "m.bin"])
def test_safetensors_by_another_name(folders: dict[str, Path], tensors: Any, tmp_path: Path, name: str) -> None:
    save_file(tensors["sd"], tmp_path / name, metadata={"modelspec.prediction_type": "v"})
    convert_weights(tmp_path / name, tmp_path / "out", base=str(folders["sd"]))
    assert "v_prediction" in (tmp_path / "out/scheduler/scheduler_config.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("markers", [("v_pred",), ("v_pred", "ztsnr")])
def test_marker_tensors_go_before_the_configs(
    folders: dict[str, Path], tensors: Any, tmp_path: Path, markers: tuple[str, ...]
) -> None:
    """As v-prediction fine-tunes of SDXL say what they are."""
    save_file({**tensors["sdxl"], **{name: torch.empty(0) for name in markers}}, tmp_path / "v.safetensors")
    made = single_file_to_folder(tmp_path / "v.safetensors", folders["sdxl"], tmp_path / "out")
    config = json.loads((made / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    assert config["prediction_type"] == "v_prediction"
    assert config.get("rescale_betas_zero_snr", False) == ("ztsnr" in markers)
    assert fewstep.load_teacher(made, device="cpu").denoiser.prediction == "v_prediction"  # type: ignore[union-attr]


def test_contradictions_and_strange_predictions_are_refused(
    folders: dict[str, Path], tensors: Any, tmp_path: Path
) -> None:
    path, marked = tmp_path / "v.safetensors", {**tensors["sd"], "v_pred": torch.empty(0)}
    save_file(marked, path, metadata={"modelspec.prediction_type": "epsilon"})
    with pytest.raises(UserError, match=r"contradicts itself: its tensor v_pred"):
        read_model_file(path)
    save_file(tensors["sd"], path, metadata={"modelspec.prediction_type": "edm"})
    with pytest.raises(UserError, match=r"modelspec\.prediction_type='edm'"):
        read_model_file(path)
    save_file({**tensors["sd"], "ztsnr": torch.empty(0)}, path)
    with pytest.raises(UserError, match=r"its tensor ztsnr says that the last noise level has no signal"):
        single_file_to_folder(path, folders["sd"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_name_that_says_v_where_nothing_else_does(folders: dict[str, Path], tensors: Any, tmp_path: Path) -> None:
    for name, header in {"noobXL_vPred10.safetensors": None, "m.safetensors": {"modelspec.title": "My V-Pred"}}.items():
        save_file(tensors["sd"], tmp_path / name, metadata=header)
        with pytest.raises(
            UserError, match=r"predicts v by its name .* \(epsilon\) says so: give a --base whose scheduler"
        ):
            single_file_to_folder(tmp_path / name, folders["sd"], tmp_path / "none")
        save_file(tensors["sd"], tmp_path / name, metadata={**(header or {}), "modelspec.prediction_type": "epsilon"})
        single_file_to_folder(tmp_path / name, folders["sd"], tmp_path / f"{name}.out")


def test_what_training_put_around_a_file(folders: dict[str, Path], tensors: Any, tmp_path: Path) -> None:
    """Prefixes of every name, and averages beside the weights, which are left out as other programs leave them out."""
    save_file(tensors["sd"], tmp_path / "plain.safetensors")
    expected = weights_of(single_file_to_folder(tmp_path / "plain.safetensors", folders["sd"], tmp_path / "plain"))
    for prefix in ("module.", "state_dict.", "module._orig_mod."):
        path, notes = tmp_path / f"{prefix}safetensors", list[str]()
        averages = {"model_ema.diffusion_modelinput_blocks00weight": torch.zeros(2), "model_ema.decay": torch.ones(1)}
        save_file({prefix + name: value for name, value in {**tensors["sd"], **averages}.items()}, path)
        assert recognise(path) == "single-file"
        found = weights_of(single_file_to_folder(path, folders["sd"], tmp_path / f"{prefix}out", notes.append))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert notes == [
            "the weights as they were trained, not their averages (model_ema.*), as other programs read such a file"
        ]


def test_a_schedule_of_the_files_own_is_refused(folders: dict[str, Path], tensors: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    own = discrete_alphas_cumprod(json.loads((folders["sd"] / "scheduler/scheduler_config.json").read_text()))
    save_file({**tensors["sd"], "alphas_cumprod": own.half()}, path)
    single_file_to_folder(path, folders["sd"], tmp_path / "same")
    betas = 1 - torch.cat([own[:1], own[1:] / own[:-1]])
    for name, same in {"betas": betas, "sqrt_alphas_cumprod": own.sqrt()}.items():  # where a file has these alone
        save_file({**tensors["sd"], name: same}, path)
        single_file_to_folder(path, folders["sd"], tmp_path / name)
        save_file({**tensors["sd"], name: same / 2}, path)
        with pytest.raises(UserError, match=r"its noise schedule .alphas_cumprod. is another than that of the base's"):
            single_file_to_folder(path, folders["sd"], tmp_path / "other")
    for other in (own - own[-1], own[::4].contiguous()):
        save_file({**tensors["sd"], "alphas_cumprod": other}, path)
        with pytest.raises(UserError, match=r"its noise schedule .alphas_cumprod. is another than that of the base's"):
            single_file_to_folder(path, folders["sd"], tmp_path / "other")


def test_latents_of_another_scale_are_refused(folders: dict[str, Path], tensors: Any, tmp_path: Path) -> None:
    """The LDM code keeps the scale in the file where it was measured rather than set."""
    path = tmp_path / "m.safetensors"
    save_file({**tensors["sd"], "scale_factor": torch.tensor(0.22)}, path)
    with pytest.raises(UserError, match=r"its latents are multiplied by 0\.22 \(scale_factor\), those of .* 0\.18215"):
        single_file_to_folder(path, folders["sd"], tmp_path / "other")


def test_clip_skip_of_the_header_is_honoured(folders: dict[str, Path], tensors: Any, tmp_path: Path) -> None:
    """As sd-scripts writes it: 2 is the layer before the last, with the last normalisation, as diffusers has clip_skip=1."""
    path, notes = tmp_path / "m.safetensors", list[str]()
    save_file(tensors["sd"], path, metadata={"modelspec.encoder_layer": "2"})
    made = single_file_to_folder(path, folders["sd"], tmp_path / "out", notes.append)
    assert notes == ["its text encoder without the last 1 of its layers, as m.safetensors says (clip skip)"]
    whole, found = (family_named("sd").text_encoders(folder) for folder in (folders["sd"], made))
    encoder: Any = whole.modules[0]
    tokens = whole._pipeline.tokenizer(
        ["a cat"], padding="max_length", max_length=whole.max_tokens, return_tensors="pt"
    )
    states = encoder(tokens.input_ids, output_hidden_states=True).hidden_states
    expected = getattr(encoder, "text_model", encoder).final_layer_norm(states[-2])
    torch.testing.assert_close(found.encode(["a cat"]).text, expected)
    assert not torch.equal(expected, whole.encode(["a cat"]).text)
    save_file(tensors["sd"], path, metadata={"modelspec.encoder_layer": "penultimate"})
    with pytest.raises(UserError, match=r"its header says modelspec\.encoder_layer='penultimate'"):
        read_model_file(path)


@pytest.mark.slow
def test_what_the_file_lacks_comes_from_the_base_and_is_said(
    folders: dict[str, Path], tensors: Any, tmp_path: Path
) -> None:
    """Without VAE, as many fine-tunes are published; and the U-Net alone."""
    path, notes = tmp_path / "m.safetensors", list[str]()
    for number, prefixes in enumerate((("first_stage_model.",), ("first_stage_model.", "cond", "conditioner."))):
        for family in ("sd", "sdxl"):
            save_file({key: v for key, v in tensors[family].items() if not key.startswith(prefixes)}, path)
            made = single_file_to_folder(path, folders[family], tmp_path / f"{family}{number}", notes.append)
            found, base = weights_of(made), weights_of(folders[family])
            assert {key.split(".")[0] for key in found} == {key.split(".")[0] for key in base}
            assert all(torch.equal(value, base[key]) for key, value in found.items() if key.startswith("vae."))
    assert notes[0] == f"vae of {folders['sd']}, because m.safetensors has none"
    assert notes[3].startswith("vae and text_encoder and text_encoder_2 of")
    said = convert_weights(path, tmp_path / "said", base=str(folders["sdxl"]))
    assert "vae" in said


@pytest.mark.slow
def test_a_base_without_the_weights_that_the_file_lacks(folders: dict[str, Path], tensors: Any, tmp_path: Path) -> None:
    base = FOLDERS["sd"](tmp_path / "base")
    save_file({k: v for k, v in tensors["sd"].items() if not k.startswith("first_stage")}, tmp_path / "m.safetensors")
    (base / "vae/diffusion_pytorch_model.safetensors").rename(base / "vae/diffusion_pytorch_model.fp16.safetensors")
    single_file_to_folder(tmp_path / "m.safetensors", base, tmp_path / "half")
    (base / "vae/diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(UserError, match=r"m\.safetensors has no vae, and .*vae no weights .* --base"):
        single_file_to_folder(tmp_path / "m.safetensors", base, tmp_path / "out")


@pytest.mark.parametrize("nested", [False, True])
def test_a_ckpt_of_tensors_is_read(folders: dict[str, Path], tensors: Any, tmp_path: Path, nested: bool) -> None:
    state: Any = OrderedDict(tensors["sd"])
    torch.save({"state_dict": state, "global_step": 7} if nested else state, tmp_path / "model.ckpt")
    single = read_model_file(tmp_path / "model.ckpt")
    unet = single.parts["unet"]
    assert torch.equal(unet["out.2.weight"], tensors["sd"]["model.diffusion_model.out.2.weight"])


class Canary:
    """Pickles as a call that would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_ckpt_with_more_than_tensors_is_refused_and_nothing_runs(tensors: Any, tmp_path: Path) -> None:
    state = {**tensors["sd"], "callback": Canary(tmp_path / "ran")}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    torch.save(state, tmp_path / "b.ckpt")
    torch.save(state, tmp_path / "c.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "d.ckpt").write_bytes(b"no pickle")
    torch.save([1, 2], tmp_path / "e.ckpt")
    for name in "abcde":
        with pytest.raises(UserError, match=r"convert it to \.safetensors"):
            read_model_file(tmp_path / f"{name}.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["weight", "bias"], r"it has 2 tensors, e\.g\. \['bias', 'weight'\]"),
        (["cond_stage_model.model.token_embedding.weight"], "is Stable Diffusion 2.x"),
        (["conditioner.embedders.0.model.positional_embedding"], "is the SDXL refiner"),
        (["model.diffusion_model.joint_blocks.0.x"], "is Stable Diffusion 3"),
        (["lora_unet_conv_in.lora_down.weight"], "is a LoRA"),
        (["down_blocks.0.resnets.0.conv1.weight"], "U-Net in diffusers' own keys"),
        (["first_stage_model.conv"], "none that begins with model.diffusion_model."),
        (["model.diffusion_model.out.2.bias", "edm_mean"], "holds 'edm_mean': its U-Net takes EDM's noise levels"),
        (["model.diffusion_model.out.2.bias", "edm_vpred.sigma_max"], "holds 'edm_vpred.sigma_max'"),
        (["model.diffusion_model.out.2.bias", "adapter.x"], r"1 of its tensors belong to no part .*'adapter\.x"),
        ([], "has 0 tensors"),
    ],
)
def test_other_models_are_named(keys: list[str], message: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(2) for key in keys}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=message):
        read_model_file(tmp_path / "m.safetensors")


def test_damaged_files_and_other_formats(tensors: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(tensors["sd"], path)
    whole = path.read_bytes()
    for content in (
        whole[:-5],
        whole[: len(whole) // 2],
        whole[:20],
        b"",
        b"\x89PNG\r\n\x1a\n" + whole[8:],
        b"PK\x03\x04" * 9,
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as safetensors") as error:
            read_model_file(path)
        assert "\n" not in str(error.value)
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match="does not exist or is no file"):
            read_model_file(missing)


@pytest.mark.slow
def test_what_does_not_fit_the_configs_is_named(folders: dict[str, Path], tensors: Any, tmp_path: Path) -> None:
    path, out = tmp_path / "m.safetensors", tmp_path / "out"

    def refused(message: str, base: str = "sd", source: Any = None, **changes: Tensor | None) -> None:
        changed = {**tensors["sd"], **{key.replace("__", "."): value for key, value in changes.items()}}
        save_file({key: value for key, value in changed.items() if value is not None}, path)
        with pytest.raises(UserError, match=message):
            single_file_to_folder(path, source or folders[base], out)
        assert not out.exists()
        assert not list(tmp_path.glob(".*"))

    refused("is Stable Diffusion 1.x or 2.x, but the configs of .* are SDXL's", base="sdxl")
    refused(r"unet is another network .* 1 missing \(out\.2\.bias\)", model__diffusion_model__out__2__bias=None)
    refused(r"1 unexpected \(extra\)", model__diffusion_model__extra=torch.zeros(1))
    refused(r"out.2.bias \(9,\) for \(4,\)", model__diffusion_model__out__2__bias=torch.zeros(9))
    refused("conv_out.bias has numbers", model__diffusion_model__out__2__bias=torch.full((4,), torch.inf))
    refused("conv_out.bias holds torch.int64", model__diffusion_model__out__2__bias=torch.zeros(4, dtype=torch.int64))
    refused("not a diffusers model", source=tmp_path)
    refused("not a hub id", source=tmp_path / "none")
    refused("cannot be fetched from the hub", source="nobody/nothing")
    out.mkdir()
    with pytest.raises(UserError, match="exists already"):
        single_file_to_folder(path, folders["sd"], out)


def test_configs_that_describe_no_network(folders: dict[str, Path], tensors: Any, tmp_path: Path) -> None:
    base = FOLDERS["sd"](tmp_path / "base")
    save_file(tensors["sd"], tmp_path / "m.safetensors")
    for part, field, value in (
        ("unet", "down_block_types", ["No"]), ("vae", "block_out_channels", 3), ("text_encoder", "hidden_size", "x"),
    ):  # fmt: skip
        config = base / part / "config.json"
        whole = config.read_text(encoding="utf-8")
        config.write_text(json.dumps({**json.loads(whole), field: value}), encoding="utf-8")
        with pytest.raises(UserError, match=part):
            single_file_to_folder(tmp_path / "m.safetensors", base, tmp_path / "out")
        config.write_text(whole, encoding="utf-8")
    (base / "vae/config.json").unlink()
    with pytest.raises(UserError, match="component vae is missing"):
        single_file_to_folder(tmp_path / "m.safetensors", base, tmp_path / "out")
