"""Damaged LoRA files in each layout: each is read or refused in one sentence, in bounded time and memory."""

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from fewstep.families.stable_diffusion.ldm_keys import ldm_layers
from fewstep.formats.kohya_lora import LoraWeights, read_lora, write_kohya_lora, write_peft_lora
from tests.families.test_ldm_keys import TINY_UNET, TINY_UNETS
from tests.mutations import assert_read_or_refused, cut_or_grown, safetensors_header, safetensors_swap

LAYERS = {"mid_block.attentions.0.proj_in": (8, 6), "conv_in": (4, 3, 3, 3), "time_embedding.linear_1": (5, 4)}


def lora() -> LoraWeights:
    """Three layers with real names and small shapes."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}
    for name, (outputs, *inputs) in LAYERS.items():
        state[f"network.{name}.lora_A.weight"] = torch.randn(2, *inputs)
        state[f"network.{name}.lora_B.weight"] = torch.randn(outputs, 2, *[1] * (len(inputs) - 1))
    return LoraWeights(2, 1.0, state)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_mutated_files_are_read_or_refused(tmp_path: Path, layout: str) -> None:
    config = UNet2DConditionModel(**TINY_UNET, **TINY_UNETS["SDXL's kind"]).config
    aliases = partial(ldm_layers, config=config)
    modules, path = [f"network.{name}" for name in LAYERS], tmp_path / "valid.safetensors"
    if layout == "kohya":
        write_kohya_lora(path, lora(), {"licence": "mit"})
    else:
        write_peft_lora(path, lora(), "unet", {"lora": '{"alpha": 2}'})
    assert read_lora(path, modules, aliases).rank == 2

    def check(found: LoraWeights, path: Path) -> None:
        assert set(found.targets) <= set(modules)
        assert all(value.dtype == torch.float32 for value in found.state.values())
        assert sum(value.nbytes for value in found.state.values()) <= 4 * 64 * path.stat().st_size

    mutations = (safetensors_header, safetensors_header, safetensors_swap, cut_or_grown)
    assert_read_or_refused(
        tmp_path, "lora.safetensors", path.read_bytes(), mutations, lambda path: read_lora(path, modules, aliases),
        check=check, seconds=15,
    )  # fmt: skip
