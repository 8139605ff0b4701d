"""One absurd number in a stranger's description costs neither memory nor time."""

import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from fewstep.errors import UserError
from fewstep.families.edm.folder import load_edm
from fewstep.families.registry import recognise
from fewstep.formats.model_folder import ModelCard, write_model_folder
from fewstep.networks.components import load_component
from fewstep.networks.untrained import build_untrained, num_values
from tests.conftest import tiny_denoiser
from tests.tiny_models import tiny_sd_folder

KINDS: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd_folder(tmp_path_factory.mktemp("model") / "sd")


class bounded:
    """Refuses the block more than 20 seconds or 500 MiB."""

    def __enter__(self) -> None:
        self.start, self.peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __exit__(self, *_: object) -> None:
        assert time.monotonic() - self.start < 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.peak < 500 * 1024


def test_shapes_take_no_memory_and_layers_have_an_end() -> None:
    with bounded():
        assert num_values(build_untrained(lambda: nn.Linear(10**6, 10**6, bias=False))) == 10**12
        with pytest.raises(ValueError, match="more than 20000 layers"):
            build_untrained(lambda: nn.Sequential(*(nn.Linear(2, 2) for _ in range(10**7))))
    assert nn.Linear(2, 2).weight.device == torch.device("cpu")  # nothing is counted any more


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "cross_attention_dim", 10**9), ("unet", "layers_per_block", 10**7), ("unet", "in_channels", 10**8),
        ("vae", "latent_channels", 10**9), ("vae", "layers_per_block", 10**8), ("text_encoder", "vocab_size", 10**9),
        ("text_encoder", "num_hidden_layers", 10**8), ("text_encoder", "hidden_size", "x"), ("vae", "norm_num_groups", None),
        ("text_encoder", "max_position_embeddings", 10**9), ("unet", "down_block_types", {"a": 1}),
    ],
)  # fmt: skip
def test_one_absurd_number_in_a_component(model: Path, tmp_path: Path, part: str, key: str, value: object) -> None:
    shutil.copytree(model / part, tmp_path / part)
    path = tmp_path / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with bounded(), pytest.raises(UserError, match=r"config\.json"):
        load_component(KINDS[part], tmp_path / part)


@pytest.mark.parametrize(
    ("file", "key"), [("scheduler/scheduler_config.json", "num_train_timesteps"), ("unet/config.json", "sample_size")]
)
def test_numbers_that_no_tensor_contradicts(model: Path, tmp_path: Path, file: str, key: str) -> None:
    shutil.copytree(model, tmp_path / "sd")
    path = tmp_path / "sd" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: 10**11}))
    with bounded(), pytest.raises(UserError, match=rf"{path.name} is damaged: {key} is 100000000000"):
        recognise(tmp_path / "sd").load(tmp_path / "sd")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_channels", 10**7),
        ("num_blocks", 10**8),
        ("label_dim", 10**12),
        ("img_channels", "x"),
        ("channel_mult", 3),
    ],
)
def test_one_absurd_number_in_a_folder_of_ours(tmp_path: Path, key: str, value: object) -> None:
    denoiser = tiny_denoiser()
    write_model_folder(tmp_path / "m", denoiser.describe(), denoiser.state_dict(), ModelCard("teacher"))
    path = tmp_path / "m/unet/config.json"
    config = json.loads(path.read_text())
    config["description"]["network"][key] = value
    path.write_text(json.dumps(config))
    with bounded(), pytest.raises(UserError, match=r"describes|description"):
        load_edm(tmp_path / "m")
