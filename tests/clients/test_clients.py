"""Other programs run what we export: `make test-clients`, slow, each program in an environment of its own.

CLIENTS_PYTHON has cyllama (stable-diffusion.cpp), COMFYUI_DIR is a checkout of ComfyUI (COMFYUI_PYTHON its interpreter).
What is compared is the same step: both sides start from the same noises, and this side holds the weights as exported.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
from fewstep.diffusion import samplers
from fewstep.export.comfyui import write_workflow
from fewstep.export.lora import export_kohya_lora, export_lora
from fewstep.export.single_file import export_single_file
from fewstep.formats.model_folder import ModelCard
from fewstep.models.model import Model
from fewstep.networks.adapters import LoraShape, SharedBase
from tests.clients.full_size import PROMPT, write_folder

CYLLAMA, COMFYUI = os.environ.get("CLIENTS_PYTHON", ""), os.environ.get("COMFYUI_DIR", "")
STEPS, SEED, SIDE = (999, 749, 499, 249), 3, 256
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (CYLLAMA or COMFYUI), reason="make test-clients names other programs to try"),
]
needs_cyllama = pytest.mark.skipif(not CYLLAMA, reason="CLIENTS_PYTHON is not set: stable-diffusion.cpp is not tried")
needs_comfyui = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_DIR is not set: ComfyUI is not tried")


@dataclass
class Exported:
    """What was exported, and the generators it was exported from."""

    folder: Path
    generators: dict[str, Model]
    files: dict[str, Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("clients")
    teacher = fewstep.load_teacher(write_folder(folder / "sd15"), device="cpu")
    whole = teacher.student(teacher.denoiser, ModelCard("generator", STEPS))
    files = {"whole": export_single_file(whole, folder / "models/model.safetensors", torch.float16)}
    role = SharedBase(teacher.denoiser, LoraShape(rank=8, alpha=8.0)).add_role("generator")
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in role.parameters():
            parameter.normal_(0, 0.02).copy_(parameter.half())
    lora = teacher.student(role.eval(), ModelCard("generator", STEPS))
    for name, write in (("kohya-lora", export_kohya_lora), ("lora", export_lora)):
        (folder / name).mkdir()
        write(folder / name, lora, name, torch.float16, {})
        files[name] = next((folder / name).glob("*.safetensors")).rename(folder / f"models/{name}.safetensors")
    return Exported(folder, {"whole": whole, "lora": lora, "kohya-lora": lora}, files)


def ours(generator: Model, noises: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The picture of `fewstep sample` from given noises, (H, W, 3), 0..255."""
    monkeypatch.setattr(samplers, "sample_noise", lambda *_, step=0, **__: noises[step])
    size = 8 * noises[0].shape[2], 8 * noises[0].shape[3]
    return np.asarray(generator.sample(PROMPT, size=size, progress=False)[0]).astype(int)


def theirs(exported: Exported, lora: str) -> np.ndarray:
    """The picture of stable-diffusion.cpp: one process, one picture."""
    out = exported.folder / "picture.npy"
    wanted: dict[str, Any] = {
        "model": str(exported.files["whole"]), "lora": str(exported.files[lora]) if lora else "", "prompt": PROMPT,
        "seed": SEED, "side": SIDE, "steps": len(STEPS), "threads": torch.get_num_threads(), "out": str(out),
    }  # fmt: skip
    command = [CYLLAMA, str(Path(__file__).parent / "render.py"), json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "unknown tensor" not in done.stdout + done.stderr
    return np.asarray(np.load(out)).astype(int)


@needs_cyllama
@pytest.mark.parametrize("name", ["whole", "lora", "kohya-lora"])
def test_stable_diffusion_cpp(exported: Exported, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single file and both LoRAs on it, to two grey levels; its random numbers on the CPU are torch's."""
    generator = torch.Generator().manual_seed(SEED)
    noises = [torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=generator) for _ in STEPS]
    picture = ours(exported.generators[name], noises, monkeypatch)
    assert picture.std() > 20  # there is something to see
    difference = np.abs(picture - theirs(exported, "" if name == "whole" else name))
    print(f"stable-diffusion.cpp, {name}: at most {difference.max()} grey levels, {difference.mean():.2f} on average")
    assert difference.max() <= 2
    if name != "whole":  # the LoRA matters
        assert np.abs(picture - ours(exported.generators["whole"], noises, monkeypatch)).max() > 20


@needs_comfyui
@pytest.mark.parametrize("name", ["whole", "kohya-lora"])
def test_comfyui(exported: Exported, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exported workflow unedited, every key accounted for, latents to 1e-5 of ours from the noises it drew."""
    workflow, out = exported.folder / f"{name}.json", exported.folder / f"{name}.npz"
    model = exported.generators[name]
    write_workflow(
        model, workflow, "model.safetensors", lora="" if name == "whole" else f"{name}.safetensors", prompt=PROMPT
    )
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), str(Path(__file__).parent / "comfyui.py")]
    command += [str(workflow), str(exported.folder / "models"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=COMFYUI)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = np.load(out)
    assert found["told"].tolist() == []
    noises = [torch.from_numpy(noise) for noise in found["noises"]]
    latents: list[torch.Tensor] = []
    inner = samplers.sample_few_steps

    def kept(*arguments: Any) -> torch.Tensor:
        latents.append(inner(*arguments))
        return latents[-1]

    monkeypatch.setattr(samplers, "sample_few_steps", kept)
    ours(model, noises, monkeypatch)
    scaled = torch.from_numpy(found["latents"]) * 0.18215  # its latents are those of the VAE
    difference = float((latents[0] - scaled).abs().max())
    print(f"ComfyUI, {name}: latents differ by at most {difference:.1e}")
    assert difference <= 1e-5
