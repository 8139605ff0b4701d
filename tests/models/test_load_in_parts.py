"""Which teachers each process of a run reads its own part of. That they are read right: tests/distributed/test_starting.py."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.families.registry import build_on_meta, recognise
from fewstep.formats.model_folder import CONFIG, WEIGHTS, ModelCard, write_model_folder
from fewstep.models.load import load_teacher
from fewstep.models.load_in_parts import load_teacher_in_parts, reads_parts
from fewstep.networks.untrained import computed_buffers
from tests.conftest import tiny_denoiser


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    denoiser = tiny_denoiser()
    write_model_folder(tmp_path / "teacher", denoiser.describe(), denoiser.state_dict(), ModelCard("teacher"))
    return tmp_path / "teacher"


def network_of(folder: Path) -> Denoiser:
    return build_on_meta(recognise(folder).describe_folder(folder))


def test_a_folder_with_the_networks_tensors_is(folder: Path) -> None:
    assert reads_parts(folder, network_of(folder))


@pytest.mark.parametrize("path", ["", "org/name", "no/such/folder", "bundled:fashion-mnist"])
def test_what_is_not_here_yet_is_taken_to_be(path: str, folder: Path) -> None:
    assert reads_parts(path, network_of(folder)) == (not path.startswith("bundled"))  # that one is another network


def test_a_pickle_is_not(folder: Path, tmp_path: Path) -> None:
    assert not reads_parts("edm-imagenet-64x64-cond-adm.pkl", network_of(folder))


@pytest.mark.parametrize("change", ["renamed", "another shape", "whole numbers", "damaged", "gone"])
def test_other_tensors_are_left_to_who_reads_them_whole(change: str, folder: Path) -> None:
    network, path = network_of(folder), folder / WEIGHTS
    weights = load_file(path)
    name = next(iter(weights))
    if change == "renamed":
        weights["another"] = weights.pop(name)
    elif change == "another shape":
        weights[name] = weights[name][:1].clone()
    elif change == "whole numbers":
        weights[name] = weights[name].to(torch.int64)
    save_file(weights, path)
    if change == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    elif change == "gone":
        path.unlink()
    assert not reads_parts(folder, network)


def test_a_table_that_no_file_has_is_not_left_on_the_meta_device(folder: Path) -> None:
    network = network_of(folder)
    network.register_buffer("table", torch.zeros(3, device="meta"), persistent=False)
    assert computed_buffers(network) == ["table"]
    assert not reads_parts(folder, network)


def test_a_description_that_is_wrong_is_left_to_who_reads_it_whole(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["description"]["network"]["channel_mult"] = "wide"
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    assert load_teacher_in_parts(folder, cast(Any, None), lambda network: None) is None
    assert f"each process reads {folder} whole before it lies in parts" in capsys.readouterr().err
    with pytest.raises(UserError, match="the description of the network is wrong"):
        load_teacher(folder)
