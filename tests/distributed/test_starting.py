"""Several processes start a run: each reads its own rows of the teacher, and has the bits that it would have of it whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.families.edm.family import EDMFamily
from fewstep.families.edm.pickle import write_edm_file
from fewstep.families.edm.unet import EDMUNetConfig
from fewstep.formats.model_folder import WEIGHTS as MODEL
from fewstep.formats.model_folder import ModelCard, write_model_folder
from fewstep.models.load import load_teacher
from fewstep.training.checkpoint import list_checkpoints, read_checkpoint
from fewstep.training.run import train
from fewstep.training.sharded_checkpoint import write_parts
from tests.distributed.processes import run_processes
from tests.networks.test_merged_loras import user_lora, written
from tests.tiny_flow_models import tiny_flux2_klein_folder, tiny_qwen_image_folder, tiny_z_image_folder
from tests.tiny_models import tiny_sd3_folder, tiny_sd_folder, tiny_sdxl_folder
from tests.training.helpers import tiny_train_settings

SMALL = 2**17  # bytes of noise schedules and of the embeddings of an example
HALF = ("sd", "sdxl", "qwen-image", "edm", "merged", "lora generator", "shared base")
WEIGHTS = "diffusion_pytorch_model.safetensors"
FAMILIES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "sd": (tiny_sd_folder, "unet"), "sdxl": (tiny_sdxl_folder, "unet"), "sd3": (tiny_sd3_folder, "transformer"),
    "z-image": (tiny_z_image_folder, "transformer"), "flux2-klein": (tiny_flux2_klein_folder, "transformer"),
    "qwen-image": (tiny_qwen_image_folder, "transformer"),
}  # fmt: skip


def split(component: Path, dtype: torch.dtype, files: int) -> None:
    """Store a network's weights in another type, in several files with an index, as diffusers' `max_shard_size` does it."""
    tensors = {name: value.to(dtype) for name, value in load_file(component / WEIGHTS).items()}
    (component / WEIGHTS).unlink()
    names, where = sorted(tensors), {}
    for number in range(files):
        own = names[number::files]
        file = f"diffusion_pytorch_model-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file({name: tensors[name] for name in own}, component / file)
        where |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": sum(value.nbytes for value in tensors.values())}, "weight_map": where}
    (component / f"{WEIGHTS}.index.json").write_text(json.dumps(index), encoding="utf-8")


def edm_folder(path: Path) -> Path:
    """In half precision, with the tables of frequencies and filters that only some of EDM's networks have."""
    torch.manual_seed(0)
    config = EDMUNetConfig(
        "song", img_resolution=16, img_channels=1, label_dim=4, model_channels=32, channel_mult=(1, 2), num_blocks=1,
        attn_resolutions=(8,), embedding_type="fourier", encoder_type="residual", channel_mult_noise=2,
        resample_filter=(1, 3, 3, 1),
    )  # fmt: skip
    denoiser = EDMDenoiser(config)
    write_model_folder(path, denoiser.describe(), denoiser.state_dict(), ModelCard("teacher"), dtype=torch.float16)
    return path


def spoilt(folder: Path, path: Path) -> Path:
    """A teacher with an infinite number in the rows of the last process."""
    shutil.copytree(folder, path)
    weights = load_file(path / MODEL)
    weights["model.dec.16x16_block0.affine.weight"][-1] = float("inf")
    save_file(weights, path / MODEL)
    return path


def teachers(work: Path) -> dict[str, Path]:
    """A teacher of each family, in files of several kinds."""
    found = {name: make(work / name) for name, (make, _) in FAMILIES.items()}
    split(found["sd"] / "unet", torch.bfloat16, 3)
    split(found["qwen-image"] / "transformer", torch.bfloat16, 2)
    only = found["sdxl"] / "unet" / WEIGHTS
    save_file(
        {name: value.half() for name, value in load_file(only).items()},
        only.with_name("diffusion_pytorch_model.fp16.safetensors"),
    )
    only.unlink()
    return found


def questions(work: Path) -> dict[str, dict[str, Any]]:
    found, no_gan = teachers(work), {"gan_generator_weight": 0.0, "gan_discriminator_weight": 0.0}

    def settings(folder: Path, loras: tuple[str, ...] = (), **changes: dict[str, Any]) -> dict[str, Any]:
        changes = {"data": {"images": ""}, **changes}
        made = tiny_train_settings(folder, work, work / "run", losses=no_gan, **changes)
        values = made.model_dump(mode="json", exclude_unset=True)
        values["teacher"]["loras"] = list(loras)
        return values

    edm = edm_folder(work / "edm")
    pickle = work / "edm.pkl"
    write_edm_file(pickle, cast(EDMDenoiser, load_teacher(edm, device="cpu").denoiser), torch.float32)
    earlier = {"ema_half_life_images": 0, "start_from": str(work / "earlier")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EDMFamily, "default_num_steps", 2)  # of the teacher's picture
        train(settings(edm, run={"folder": earlier["start_from"], "sample_images": 1}, training={"num_steps": 1}))
    (checkpoint,) = list_checkpoints(work / "earlier/checkpoints")
    tensors, state = read_checkpoint(checkpoint)
    shutil.rmtree(checkpoint)
    write_parts(
        checkpoint, tensors, state, None
    )  # as several processes write it: read whole it would be in memory of this one
    lora = written(
        work / "lora.safetensors", user_lora(load_teacher(found["sd"], device="cpu").denoiser, "sd"), "kohya", "unet"
    )

    named = {name: settings(folder) for name, folder in {**found, "edm": edm, "pickle": pickle}.items()}
    adapters = {"mode": "lora_generator", "lora": [2, 2.0]}
    return named | {
        "not finite": settings(spoilt(edm, work / "spoilt")),
        "going on": settings(edm, generator=earlier),
        "merged": settings(found["sd"], (f"{lora}:0.7", f"{lora}:-0.2")),
        "lora generator": settings(found["qwen-image"], memory=adapters),
        "shared base": settings(
            found["sdxl"], memory=adapters | {"mode": "shared_base", "base": "bf16"}, compute={"precision": "bf16"}
        ),
        "offloaded": settings(
            found["sd3"], memory={"teacher": "offloaded", "base": "bf16"}, compute={"precision": "bf16"}
        ),
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_each_process_reads_its_rows(tmp_path: Path) -> None:
    asked = questions(tmp_path)
    (tmp_path / "questions.json").write_text(json.dumps(asked), encoding="utf-8")
    ended = run_processes(2, "-m", "tests.distributed.starting", str(tmp_path), timeout=600)
    assert [code for code, _ in ended] == [0, 0], "\n".join(said for _, said in ended)
    for number in range(2):
        started = json.loads((tmp_path / f"started-{number}.json").read_text(encoding="utf-8"))
        assert started.keys() == asked.keys()
        refused = started.pop("not finite")["refused"]
        assert refused.startswith(f"{tmp_path / 'spoilt' / MODEL}: ")
        assert "numbers in model.dec.16x16_block0.affine.weight are infinite or NaN" in refused
        for name, found in started.items():
            assert found["differs"] == [], name
            bound = found["teacher"] + 1.1 * found["largest"] + SMALL
            if name == "merged":  # two LoRAs, read and put in order, and what they add to a layer, which is made twice
                bound += 4 * (tmp_path / "lora.safetensors").stat().st_size + 2 * found["largest"]
            assert (found["reading"] < bound) == (name != "pickle"), (name, found)
            if name in HALF:  # what is stored so is made anew in float32, while other files are pages of the system's
                assert found["whole"]["reading"] > bound, (name, found)
            if (
                name == "going on"
            ):  # each process reads its own parts of the earlier run, once more and into what it has
                assert 0 < found["going on"] < 2 * found["teacher"] + 1.1 * found["largest"] + SMALL, (name, found)
            if name not in ("pickle", "offloaded"):  # the latter is in float32 until the others are copies of it
                assert found["building"] < found["roles"] + 1.1 * found["largest"] + SMALL, (name, found)
    assert "each process reads" in ended[0][1]
    told = [line for line in ended[0][1].splitlines() if "whole before it lies in parts" in line]
    assert len(told) == 1
    assert str(tmp_path / "edm.pkl") in told[0]
    assert "whole before it lies in parts" not in ended[1][1]
