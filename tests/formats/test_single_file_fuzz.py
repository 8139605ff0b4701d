"""A thousand damaged safetensors files: each is read or refused in one sentence, in bounded time and memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from fewstep.errors import UserError
from fewstep.preparation.single_file import read_model_file
from tests.mutations import (
    assert_read_or_refused,
    cut_or_grown,
    join_safetensors,
    safetensors_header,
    safetensors_swap,
    split_safetensors,
)


def valid_file() -> bytes:
    """Two tensors of every component; as a whole it is read."""
    keys = [
        "model.diffusion_model.out.2.weight", "model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.weight",
        "first_stage_model.quant_conv.bias", "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ]  # fmt: skip
    return save({key: torch.full((3, 4), float(n)) for n, key in enumerate(keys)}, {"modelspec.prediction_type": "v"})


def test_a_thousand_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "valid.safetensors"
    path.write_bytes(valid_file())
    assert read_model_file(path).prediction_type == "v_prediction"
    mutations = (safetensors_header, safetensors_header, safetensors_header, safetensors_swap, cut_or_grown)
    assert_read_or_refused(tmp_path, "model.safetensors", valid_file(), mutations, read_model_file, seconds=15)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F64", "I64"])
def test_unusual_dtypes_are_read_or_named(dtype: str, tmp_path: Path) -> None:
    """The reader takes them; whether a network can is seen with its config."""
    header, data = split_safetensors(valid_file())
    size = {"F8_E4M3": 1, "F64": 8, "I64": 8}[dtype]
    for entry in header.values():
        if "dtype" in entry:
            entry["dtype"], entry["shape"] = dtype, [48 // size]
    path = tmp_path / "model.safetensors"
    path.write_bytes(join_safetensors(json.dumps(header).encode(), data))
    single = read_model_file(path)
    config: dict[str, Any] = {}
    shapes = {"final_layer_norm.weight": torch.Size([48 // size]), "final_layer_norm.bias": torch.Size([48 // size])}
    if dtype == "I64":
        with pytest.raises(UserError, match=r"holds torch\.int64, no weights"):
            single.diffusers_state("text_encoder", config, shapes)
    else:
        state = single.diffusers_state("text_encoder", config, shapes)
        kept = torch.float16 if dtype == "F8_E4M3" else torch.float32  # which holds each of its values
        assert all(value.dtype == kept for value in state.values())
