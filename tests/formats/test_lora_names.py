"""A LoRA's keys and shapes against real layer lists: tiny U-Nets, and Stable Diffusion 1.5 and SDXL in full."""

from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.families.registry import build_released, family_named
from fewstep.families.stable_diffusion.ldm_keys import ldm_layers, ldm_name
from fewstep.formats.kohya_lora import LoraWeights, read_lora, write_kohya_lora, write_peft_lora
from fewstep.networks.adapters import LoraShape, SharedBase
from tests.families.test_ldm_keys import TINY_UNET, TINY_UNETS, released_unet

RELEASED = [("sd15", 278), ("sdxl", 788)]
# Embeddings and ends, which a LoRA of every layer adapts too
ENDS = ("time_embedding.linear_1", "time_embedding.linear_2", "conv_in", "conv_out")


@cache
def unet_of(name: str) -> Any:
    if name in ("sd15", "sdxl"):
        return released_unet(name)
    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY_UNET, **TINY_UNETS[name])


def layers_of(unet: nn.Module) -> dict[str, nn.Module]:
    """Everything that a LoRA can sit on."""
    return {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def factors(layers: dict[str, nn.Module], rank: int = 1) -> LoraWeights:
    """A LoRA whose matrices have each layer's own shapes and a number of their own."""
    state: dict[str, Tensor] = {}
    for number, (name, layer) in enumerate(layers.items()):
        outputs, *inputs = layer.weight.shape  # type: ignore[misc]
        state[f"network.{name}.lora_A.weight"] = torch.full((rank, *inputs), float(number))
        state[f"network.{name}.lora_B.weight"] = torch.full((outputs, rank, *[1] * (len(inputs) - 1)), number + 0.5)
    return LoraWeights(rank, 0.5, state)


def with_ldm_names(path: Path, unet: Any) -> Path:
    """The same kohya file under the original code's block names, as kohya's trainer writes SDXL's."""
    underscored = {
        name.replace(".", "_"): ldm_name("unet", f"{name}.weight", unet.config)
        .removesuffix(".weight")
        .replace(".", "_")
        for name in layers_of(unet)
    }
    tensors = {}
    for key, value in load_file(path).items():
        layer, _, part = key.removeprefix("lora_unet_").partition(".")
        tensors[f"lora_unet_{underscored[layer]}.{part}"] = value
    save_file(tensors, path.with_name("ldm.safetensors"))
    return path.with_name("ldm.safetensors")


def same(a: LoraWeights, b: LoraWeights) -> None:
    assert (a.rank, a.alpha, a.state.keys()) == (b.rank, b.alpha, b.state.keys())
    assert all(torch.equal(a.state[name], b.state[name]) for name in a.state)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TINY_UNETS, "sd15", "sdxl"])
def test_both_vocabularies_of_kohya_are_one_lora(tmp_path: Path, name: str) -> None:
    """Every layer that has weights, embeddings included; "network." before the names or not."""
    unet = unet_of(name)
    modules = [f"network.{module}" for module, _ in unet.named_modules() if module] + ["network", ""]
    lora = factors(layers_of(unet))
    write_kohya_lora(tmp_path / "lora.safetensors", lora, {})
    path = with_ldm_names(tmp_path / "lora.safetensors", unet)
    keys = set(load_file(path))
    assert not {key for key in keys if "down_blocks" in key or "attentions" in key}
    same(read_lora(tmp_path / "lora.safetensors", modules, partial(ldm_layers, config=unet.config)), lora)
    same(read_lora(path, modules, partial(ldm_layers, config=unet.config)), lora)
    plain = read_lora(path, [module for module, _ in unet.named_modules()], partial(ldm_layers, config=unet.config))
    assert sorted(plain.targets) == sorted(target.removeprefix("network.") for target in lora.targets)
    with pytest.raises(UserError, match=r"is a LoRA for another base: .* keys name layers that this network does not"):
        read_lora(path, modules)


def test_known_names_of_kohyas_sdxl_files(tmp_path: Path) -> None:
    """As published files have them; a mistake in our own table cannot hide in a round trip."""
    known = {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj": "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in", "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "output_blocks_0_1_transformer_blocks_0_attn2_to_out_0": "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv", "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_0_0": "conv_in", "out_2": "conv_out", "time_embed_2": "time_embedding.linear_2",
        "label_emb_0_0": "add_embedding.linear_1", "output_blocks_8_0_skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
        "input_blocks_1_0_emb_layers_1": "down_blocks.0.resnets.0.time_emb_proj",
    }  # fmt: skip
    unet = unet_of("sdxl")
    found = {
        words.replace(".", "_"): name for words, name in ldm_layers(dict(unet.named_modules()), unet.config).items()
    }
    assert {words: found.get(words) for words in known} == known
    assert ldm_layers(["conv_in"], {**unet.config, "mid_block_type": "UNetMidBlock2D"}) == {}


@pytest.mark.slow
def test_diffusers_reads_the_same_layers_of_an_sdxl_file(tmp_path: Path) -> None:
    """An independent reader of the original names: every block layer, to its own name."""
    unet = unet_of("sdxl")
    layers = {name: layer for name, layer in layers_of(unet).items() if name not in ENDS and "embedding" not in name}
    lora = factors(layers)
    write_kohya_lora(tmp_path / "lora.safetensors", lora, {})
    path = with_ldm_names(tmp_path / "lora.safetensors", unet)
    ours = read_lora(path, [module for module, _ in unet.named_modules()], partial(ldm_layers, config=unet.config))
    mapped = _maybe_map_sgm_blocks_to_diffusers(load_file(path), unet.config)
    theirs = in_peft_names(mapped)
    assert theirs.keys() == ours.state.keys()
    assert all(torch.equal(theirs[name], ours.state[name]) for name in theirs)


def in_peft_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' conversion of a kohya file with diffusers' block names."""
    converted, _ = _convert_non_diffusers_lora_to_diffusers(dict(tensors))
    return convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in converted.items()})


def published_targets(names: Iterable[str]) -> list[str]:
    return [
        name for name in names if any(f".{name}".endswith(f".{target}") for target in family_named("sdxl").lora_targets)
    ]


def assert_factors_fit(state: dict[str, Tensor], unet: nn.Module, rank: int) -> None:
    """down (rank, in, ...) and up (out, rank, 1, 1) of each layer's own weight (out, in, ...)."""
    for name, value in state.items():
        layer, _, part = name.partition(".lora_")
        outputs, *inputs = unet.get_submodule(layer.removeprefix("network.")).weight.shape  # type: ignore[misc]
        up = (outputs, rank, *[1] * (len(inputs) - 1))
        assert tuple(value.shape) == ((rank, *inputs) if part == "A.weight" else up), name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), RELEASED)
def test_real_models_have_one_layer_a_key_with_its_shapes(tmp_path: Path, name: str, layers: int) -> None:
    """What our training makes for SD 1.5 and SDXL in full (published targets): both layouts, our reader and diffusers'."""
    denoiser = build_released(name)
    role = SharedBase(denoiser, LoraShape(rank=2, alpha=1.0)).add_role("generator")
    made = {key: torch.ones(value.shape) for key, value in role.adapter_state().items()}
    unet = unet_of(name)
    names = [module for module, _ in unet.named_modules()]
    assert len({module.replace(".", "_") for module in names}) == len(names)
    lora = LoraWeights(2, 1.0, made)
    assert sorted(target.removeprefix("network.") for target in lora.targets) == sorted(published_targets(names))
    assert len(lora.targets) == layers
    assert_factors_fit(made, unet, rank=2)
    path = tmp_path / "lora.safetensors"
    for write in (lambda: write_kohya_lora(path, lora, {}), lambda: write_peft_lora(path, lora, "unet", {})):
        write()
        found = read_lora(path, names, partial(ldm_layers, config=unet.config))
        assert len(found.targets) == layers
        assert_factors_fit(found.state, unet, rank=2)
    assert_factors_fit({key.removeprefix("unet."): value for key, value in load_file(path).items()}, unet, rank=2)
    write_kohya_lora(path, lora, {})
    theirs = in_peft_names(load_file(path))
    assert len(theirs) == 2 * layers
    assert_factors_fit(theirs, unet, rank=2)
