"""TAESD in the place of the VAE: the pixels of a diffusers pipeline whose VAE was replaced, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from huggingface_hub.errors import LocalEntryNotFoundError

from fewstep.errors import UserError
from fewstep.export.text_pipeline import absent_components
from fewstep.models.load import load_generator, load_teacher
from fewstep.models.model import Model
from fewstep.networks import hub_folders
from fewstep.networks.tiny_autoencoder import load_tiny_autoencoder
from tests.export.text_generators import write_run
from tests.tiny_models import tiny_sd3_folder, tiny_sd_folder, tiny_sdxl_folder, tiny_taesd_folder


def load(folder: Path) -> Model:
    teacher = load_teacher(folder, device="cpu")
    return teacher


@pytest.mark.slow
@pytest.mark.parametrize("write", [tiny_sd_folder, tiny_sdxl_folder, tiny_sd3_folder])
def test_decodes_as_a_pipeline_with_its_vae_replaced(write: Callable[[Path], Path], tmp_path: Path) -> None:
    folder, tiny = write(tmp_path / "model"), tiny_taesd_folder(tmp_path / "taesd")
    vae = AutoencoderTiny.from_pretrained(tiny)
    pipe: Any = DiffusionPipeline.from_pretrained(folder, vae=vae, **dict.fromkeys(absent_components(folder)))
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 2, "latents": torch.randn(1, 4, 8, 8)}
    latents = pipe("red cat", output_type="latent", **options).images
    expected = pipe("red cat", output_type="pt", **options).images * 2 - 1
    teacher = load(folder)
    own = teacher.decoder.images(latents)
    teacher.decoder = teacher.tiny_decoder(tiny)
    images = teacher.decoder.images(latents)
    assert (images - expected).abs().max() < 1e-5
    assert (images - own).abs().max() > 0.05  # the model's own VAE shows something else
    assert expected.std() > 0.01


@pytest.mark.slow
def test_the_full_vae_is_not_read(tmp_path: Path) -> None:
    folder = tiny_sd_folder(tmp_path / "model")
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    teacher = load(folder)
    teacher.decoder = teacher.tiny_decoder(tiny_taesd_folder(tmp_path / "taesd"))
    assert teacher.size == (16, 16)
    assert teacher.sample(["cat"], num_inference_steps=1, output="tensor").shape == (1, 3, 16, 16)


@pytest.mark.slow
def test_the_full_vae_is_not_read_for_a_generator(tmp_path: Path) -> None:
    run = write_run(tmp_path, "sd", (999,))
    (tmp_path / "teacher/vae/diffusion_pytorch_model.safetensors").unlink()
    generator = load_generator(run, device="cpu")
    generator.decoder = generator.tiny_decoder(tiny_taesd_folder(tmp_path / "taesd"))
    assert generator.sample(["cat"], output="tensor").shape == (1, 3, 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"), [({"latent_channels": 16}, "16 channels 2x"), ({"blocks": 3}, "4 channels 4x")]
)
def test_another_familys_latents_are_refused(tmp_path: Path, options: dict[str, int], words: str) -> None:
    teacher = load(tiny_sd_folder(tmp_path / "model"))
    tiny = tiny_taesd_folder(tmp_path / "taesd", **options)
    with pytest.raises(UserError, match=f"decodes latents of {words}, this model makes 4 channels 2x"):
        teacher.decoder = teacher.tiny_decoder(tiny)
    assert "autoencoder" not in teacher.__dict__


def test_what_is_no_taesd_is_refused(tmp_path: Path) -> None:
    model = tiny_sd_folder(tmp_path / "model")
    with pytest.raises(UserError, match="does not name AutoencoderTiny"):
        load_tiny_autoencoder(model / "vae")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_tiny_autoencoder(tmp_path / "empty")
    for name in ("nothing", "./no/thing", str(tmp_path / "no/thing")):
        with pytest.raises(UserError, match="neither a folder nor a hub id"):
            load_tiny_autoencoder(name)
    tiny = tiny_taesd_folder(tmp_path / "taesd")
    (tiny / "diffusion_pytorch_model.safetensors").write_bytes(b"xx")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tiny_autoencoder(tiny)


def test_hub_ids_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, asked = tiny_taesd_folder(tmp_path / "taesd"), []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tiny)

    monkeypatch.setattr(hub_folders.huggingface_hub, "snapshot_download", fetch)
    assert load_tiny_autoencoder("madebyollin/taesd").latent_channels == 4
    assert asked == [("madebyollin/taesd", ["config.json", "diffusion_pytorch_model.safetensors"])]


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("offline\nand more")

    monkeypatch.setattr(hub_folders.huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        UserError, match=r"nobody/taesd is no local folder and cannot be fetched from the hub \(it is not in the cache"
    ):
        load_tiny_autoencoder("nobody/taesd")
