"""Components of diffusers folders: whole or refused in one sentence, in both layouts of CLIP's text encoder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from fewstep import load_teacher
from fewstep.errors import UserError
from fewstep.networks.components import load_component, published_names
from tests.tiny_models import tiny_sd_folder, tiny_sdxl_folder

KINDS: dict[str, tuple[Any, str]] = {
    "unet": (UNet2DConditionModel, "diffusion_pytorch_model.safetensors"),
    "vae": (AutoencoderKL, "diffusion_pytorch_model.safetensors"),
    "text_encoder": (CLIPTextModel, "model.safetensors"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd_folder(tmp_path_factory.mktemp("model") / "sd")


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def refused(kind: Any, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_component(kind, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", KINDS)
def test_damaged_weights_name_the_folder(model: Path, tmp_path: Path, name: str) -> None:
    """Truncated, one tensor lacking, one of another shape, none at all; transformers alone would go on at random."""
    kind, file = KINDS[name]
    for change in ("truncated", "lacking", "reshaped", "gone"):
        folder = tmp_path / change
        shutil.copytree(model / name, folder)
        first = sorted(load_file(folder / file))[0]
        if change == "truncated":
            (folder / file).write_bytes((folder / file).read_bytes()[:5000])
        elif change == "gone":
            (folder / file).unlink()
        elif change == "lacking":
            rewrite(folder / file, lambda state, first=first: {key: state[key] for key in state if key != first})  # type: ignore[misc]
        else:
            rewrite(folder / file, lambda state, first=first: {**state, first: torch.zeros(3)})  # type: ignore[misc]
        words = refused(kind, folder)
        assert words.startswith(str(folder))
        assert words.endswith("download it again")
        expected = {"truncated": "while deserializing header", "gone": f"no file named {file}"}
        assert expected.get(change, first) in words


@pytest.mark.parametrize("name", ["vae", "text_encoder"])
def test_another_networks_weights_name_keys(model: Path, tmp_path: Path, name: str) -> None:
    kind, file = KINDS[name]
    shutil.copytree(model / name, tmp_path / name)
    shutil.copyfile(model / "unet/diffusion_pytorch_model.safetensors", tmp_path / name / file)
    words = refused(kind, tmp_path / name)
    assert "holds another network than its config.json describes: " in words
    assert "unexpected ['conv_in.bias', " in words


def test_another_unets_weights(model: Path, tmp_path: Path) -> None:
    kind, file = KINDS["unet"]
    shutil.copytree(model / "unet", tmp_path / "unet")
    other = tiny_sdxl_folder(tmp_path / "xl")
    shutil.copyfile(other / "unet" / file, tmp_path / "unet" / file)
    assert "mid_block.attentions.0.proj_in.weight" in refused(kind, tmp_path / "unet")


@torch.no_grad()
def test_a_text_encoder_of_either_transformers_is_read(model: Path, tmp_path: Path) -> None:
    """With and without `text_model.` before the names: the same embeddings, whichever version reads."""
    tokens = torch.tensor([[1, 5, 2]])
    expected = load_component(CLIPTextModel, model / "text_encoder").eval()(tokens)[0]
    assert expected.std() > 0.01
    for prefix in ("", "text_model."):
        folder = tmp_path / f"encoder{len(prefix)}"
        shutil.copytree(model / "text_encoder", folder)
        rewrite(
            folder / "model.safetensors",
            lambda state, prefix=prefix: {  # type: ignore[misc]
                prefix + key.removeprefix("text_model."): value for key, value in state.items()
            },
        )
        assert torch.equal(load_component(CLIPTextModel, folder).eval()(tokens)[0], expected)


def test_published_names() -> None:
    short, full = {"final_layer_norm.bias": torch.zeros(1)}, {"text_model.final_layer_norm.bias": torch.zeros(1)}
    assert published_names(short, "CLIPTextModel") == full
    assert published_names(full, "CLIPTextModel") == full
    assert published_names(short, "T5EncoderModel") == short


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("unet", {"norm_num_groups": -1}, "norm_num_groups=-1, which is not a whole number of 0 or more"),
        ("unet", {"layers_per_block": -1}, "layers_per_block=-1, which is not a whole number of 0 or more"),
        ("unet", {"downsample_padding": 0.5}, "downsample_padding=0.5, which is not a whole number of 0 or more"),
        ("vae", {"norm_num_groups": 1.5}, "norm_num_groups is 1.5, not a whole number of 0 or more"),
    ],
)
def test_counts_are_whole_numbers(model: Path, tmp_path: Path, file: str, change: dict[str, Any], told: str) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    path = folder / file / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as caught:
        load_teacher(folder, device="cpu").sample("cat", num_inference_steps=1)
    assert told in str(caught.value)


@pytest.mark.slow
def test_tokenizer_and_encoder_belong_together(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    path = folder / "tokenizer/vocab.json"
    kept = path.read_text()
    words = json.loads(kept)
    path.write_text(json.dumps({**words, "<|startoftext|>": 10**6}))
    with pytest.raises(UserError, match="tokenizer has a token of number 1000000, its encoder knows"):
        load_teacher(folder, device="cpu").sample("cat", num_inference_steps=1)
    path.write_text(kept)
    (folder / "tokenizer/tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="does not say how many tokens the encoder reads"):
        load_teacher(folder, device="cpu").sample("cat", num_inference_steps=1)


@pytest.mark.parametrize(
    ("name", "added", "told"),
    [
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.scale_weight", "no part of the network"),
        ("unet", "down_blocks.9.resnets.0.conv1.weight", "no part of the network"),
        ("vae", "decoder.extra.weight", "no part of the network"),
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1.weight_scale", "no part of the network"),
        ("text_encoder", "text_model.encoder.layers.9.mlp.fc1.weight", ""),  # cut off by the config, as for clip skip
        ("text_encoder", "text_model.embeddings.position_ids", ""),
        ("text_encoder", "vision_model.encoder.layers.0.mlp.fc1.weight", ""),
    ],
)
def test_tensors_that_a_network_does_not_take(model: Path, tmp_path: Path, name: str, added: str, told: str) -> None:
    """diffusers and transformers drop them with a warning: a quantised network would compute something else."""
    kind, file = KINDS[name]
    shutil.copytree(model / name, tmp_path / name)
    rewrite(tmp_path / name / file, lambda state: {**state, added: torch.ones(2)})
    if told:
        words = refused(kind, tmp_path / name)
        assert told in words
        assert added.removeprefix("text_model.") in words
    else:
        load_component(kind, tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_whole_numbers_are_no_weights(model: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    kind, file = KINDS["unet"]
    shutil.copytree(model / "unet", tmp_path / "unet")
    rewrite(
        tmp_path / "unet" / file, lambda state: {k: (v * 9).to(dtype) if v.ndim > 1 else v for k, v in state.items()}
    )
    assert "is stored as " in refused(kind, tmp_path / "unet")


def test_pickles_alone_and_quantised_configs_are_told(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model / "unet", tmp_path / "unet")
    weights = tmp_path / "unet" / KINDS["unet"][1]
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    assert "in diffusion_pytorch_model.bin alone, a pickle" in refused(UNet2DConditionModel, tmp_path / "unet")
    shutil.copytree(model / "text_encoder", tmp_path / "text_encoder")
    config = tmp_path / "text_encoder/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"load_in_8bit": True}}))
    assert "is quantised (quantization_config" in refused(CLIPTextModel, tmp_path / "text_encoder")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_weights_are_the_files_whatever_dtype_a_config_names(model: Path, tmp_path: Path, key: str) -> None:
    """transformers 5 rounds them to it on loading; fine-tunes are saved in float32 with a config that says float16."""
    folder = shutil.copytree(model / "text_encoder", tmp_path / "text_encoder")
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    (folder / "config.json").write_text(json.dumps({**config, key: "bfloat16"}))
    found = {
        name.removeprefix("text_model."): value
        for name, value in load_component(CLIPTextModel, folder).state_dict().items()
    }
    for name, value in load_file(model / "text_encoder/model.safetensors").items():
        assert torch.equal(found[name.removeprefix("text_model.")], value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", KINDS)
def test_numbers_that_are_none_name_the_tensor(model: Path, tmp_path: Path, name: str, value: float) -> None:
    """Pictures from such weights are black, and a VAE's are not seen by the losses."""
    kind, file = KINDS[name]
    shutil.copytree(model / name, tmp_path / name)
    wanted = max(load_file(tmp_path / name / file))

    def damage(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state[wanted].view(-1)[-1] = value
        return state

    rewrite(tmp_path / name / file, damage)
    words = refused(kind, tmp_path / name)
    assert words.startswith(f"{tmp_path / name}: 1 of the ")
    assert wanted.removeprefix("text_model.") in words


def test_outputs_have_names_whatever_a_config_says(tmp_path: Path) -> None:
    folder = tiny_sdxl_folder(tmp_path / "sdxl")
    expected = load_teacher(folder, device="cpu").sample("red cat", num_inference_steps=2, output="tensor")
    for part in ("text_encoder", "text_encoder_2"):
        config = folder / part / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "return_dict": False}))
    found = load_teacher(folder, device="cpu").sample("red cat", num_inference_steps=2, output="tensor")
    assert torch.equal(found, expected)
