"""Structurally mutated EDM pickles and prompt lists: each is read or refused; none runs or runs away."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.data.prompts import load_prompts
from fewstep.formats.edm_pickle import plain_value, read_edm_pickle
from fewstep.formats.edm_pickle_writer import write_edm_pickle
from tests.mutations import PICKLE_MUTATIONS, assert_read_or_refused, nested


@pytest.mark.slow
def test_edm_pickles(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = ("map_noise.freqs", "map_layer0.weight", "enc.8x8_conv.weight", "dec.8x8_in0.qkv.weight")
    tensors = {f"model.{name}": torch.randn(4, 4) for name in names}
    arguments = {"img_resolution": 8, "model_type": "DhariwalUNet", "channel_mult": [1, 4], "augment": {"p": 0.12}}
    write_edm_pickle(tmp_path / "valid.pkl", tensors, arguments)
    valid = (tmp_path / "valid.pkl").read_bytes()
    assert read_edm_pickle(tmp_path / "valid.pkl").state_dict.keys() == tensors.keys()

    def check(found: Any, path: Path) -> None:
        assert all(type(tensor) is Tensor for tensor in found.state_dict.values())
        assert sum(tensor.nbytes for tensor in found.state_dict.values()) <= path.stat().st_size
        plain_value(found.init_kwargs)

    mutations = (*PICKLE_MUTATIONS, nested, nested)
    assert_read_or_refused(tmp_path, "teacher.pkl", valid, mutations, read_edm_pickle, check=check)


@pytest.mark.slow
def test_prompt_lists(tmp_path: Path) -> None:
    prompts = ["a red cat", "a dog", "ein Hündchen", "x" * 300, "two\nlines", *(f"prompt {n}" for n in range(30))]

    def check(found: list[str], path: Path) -> None:
        assert all(type(prompt) is str and prompt.strip() for prompt in found)
        assert sum(map(len, found)) <= 40 * path.stat().st_size

    for protocol in (2, 4):
        folder = tmp_path / str(protocol)
        folder.mkdir()
        valid = pickle.dumps(prompts, protocol=protocol)
        (folder / "valid.pkl").write_bytes(valid)
        assert load_prompts(folder / "valid.pkl") == prompts
        assert_read_or_refused(folder, "prompts.pkl", valid, PICKLE_MUTATIONS, load_prompts, check=check, seconds=10)
