from pathlib import Path

import numpy as np
import pytest
import torch

import fewstep
from fewstep.errors import UserError
from fewstep.export.diffusers_folder import EDMUNetModel, FewstepPipeline
from fewstep.formats.model_folder import ModelCard, write_model_folder
from fewstep.formats.pixels import to_uint8
from tests.conftest import tiny_denoiser


@pytest.fixture(params=[(999,), (999, 749, 499, 249)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    denoiser = tiny_denoiser()
    card = ModelCard(role="generator", step_indices=request.param)
    write_model_folder(tmp_path / "generator", denoiser.describe(), denoiser.state_dict(), card)
    return tmp_path / "generator"


def test_pipeline_makes_the_pixels_of_load_generator(folder: Path) -> None:
    expected = fewstep.load_generator(folder, device="cpu").sample(5, seed=4, output="tensor")
    pipeline = FewstepPipeline.from_pretrained(folder)
    torch.testing.assert_close(pipeline(num_images=5, seed=4, output_type="pt").images, expected, rtol=0, atol=0)
    pictures = fewstep.load_pipeline(folder)(num_images=5, seed=4).images
    np.testing.assert_array_equal(np.asarray(pictures[3]), to_uint8(expected)[3, 0].numpy())


def test_pipeline_survives_diffusers_own_saving(folder: Path, tmp_path: Path) -> None:
    pipeline = FewstepPipeline.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path / "again")
    again = FewstepPipeline.from_pretrained(tmp_path / "again")
    a, b = (p(num_images=2, class_labels=[1, 3], output_type="pt").images for p in (pipeline, again))
    assert torch.equal(a, b)


def test_unet_alone_loads_with_all_weights(folder: Path) -> None:
    unet, info = EDMUNetModel.from_pretrained(folder, subfolder="unet", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    sigma = torch.full((1,), 2.0)
    x = torch.randn(1, 1, 16, 16)
    labels = torch.eye(4)[:1]
    assert unet(x, sigma, labels).shape == x.shape


def test_a_teacher_folder_is_refused(teacher_folder: Path) -> None:
    with pytest.raises(UserError, match=r"scheduler_config.json is missing"):
        fewstep.load_pipeline(teacher_folder)
