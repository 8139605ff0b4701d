"""Twenty steps of four tiny runs, written down exactly: what a rebuilding must not change.

    python -m tests.identity.record tests/identity/before.json

Each run goes through the command line, here in a process of its own, in float32 with one thread, and is described by
what it leaves in its folder: every metric of every step as an exact number, and of every trained tensor a digest and its norm.
Names of tensors are left out, because they may change where values may not.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.tiny_models import tiny_sd_folder, tiny_sdxl_folder

PROMPTS = ["red cat", "a dog", "blue bird", "dog", "cat"]
NOT_MATHS = ("images_per_second", "seconds", "peak_memory_gib", "data_wait_share")
COMMON = """
[optimizer]
generator_lr = 1e-3
fake_score_lr = 1e-3
warmup_steps = 4
[training]
num_steps = 20
batch_size = 4
generator_every = 2
seed = 3
[compute]
device = "cpu"
precision = "fp32"
threads = 1
[run]
log_every = 5
sample_every = 100
checkpoint_every = 20
sample_images = 3
tensorboard = false
[losses]
gan_generator_weight = 5e-3
gan_discriminator_weight = 1e-2
"""
CLASS = """
[teacher]
path = "bundled:fashion-mnist"
[generator]
ema_half_life_images = 100
[data]
images = "{work}/grey"
fit = "pad"
"""
TEXT = """
[teacher]
path = "{work}/{family}"
guidance_scale = 3.0
[generator]
step_indices = [999, 749, 499, 249]
ema_half_life_images = 40
[data]
prompts = "{work}/prompts.txt"
latents = "{work}/latents-{family}"
[memory]
lora_rank = 4
mode = "{mode}"
"""
RUNS = {
    "class": ("", ""), "text-full": ("sd", "full"), "text-lora-generator": ("sdxl", "lora_generator"),
    "text-shared-base": ("sd", "shared_base"),
}  # fmt: skip
COMMAND = (
    "try:\n from fewstep.cli.main.main import main\nexcept ImportError:\n from fewstep.cli.main import main\nmain()"
)


def fewstep(*arguments: object) -> None:
    """The command, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def make_inputs(work: Path, fewstep: Callable[..., None] = fewstep) -> None:
    """Models, pictures, prompts and latents of all runs; the same on every machine but for rounding in the latents."""
    random = np.random.default_rng(0)
    (work / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    for name in ("colour", "grey"):
        (work / name).mkdir()
    lines = []
    for number in range(6):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(work / f"colour/{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": PROMPTS[number % 5]}))
    (work / "colour/metadata.jsonl").write_text("\n".join(lines))
    labels = []
    for label in range(10):
        Image.fromarray(random.integers(0, 255, (28, 28), dtype=np.uint8)).save(work / f"grey/{label}.png")
        labels.append(json.dumps({"file_name": f"{label}.png", "label": label}))
    (work / "grey/metadata.jsonl").write_text("\n".join(labels))
    for family, make in (("sd", tiny_sd_folder), ("sdxl", tiny_sdxl_folder)):
        make(work / family)
        fewstep(
            "prepare", "latents", work / family, work / f"latents-{family}", "--images", work / "colour",
            "--resolution", 16, "--device", "cpu",
        )  # fmt: skip


def record_run(name: str, work: Path, fewstep: Callable[..., None] = fewstep) -> dict[str, Any]:
    """One run as its exact metrics and trained tensors."""
    family, mode = RUNS[name]
    recipe = work / f"{name}.toml"
    recipe.write_text((TEXT if family else CLASS).format(work=work, family=family, mode=mode) + COMMON)
    folder = work / f"run-{name}"
    fewstep("train", recipe, f"run.folder={folder}")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [
        {key: float(value).hex() for key, value in line.items() if key not in NOT_MATHS and key != "step"}
        for line in steps
        if "fake_score_loss" in line
    ]
    (checkpoint,) = (folder / "checkpoints").glob("step_*/tensors.safetensors")
    trained = {
        key: value
        for key, value in load_file(checkpoint).items()
        if key.split(".")[0] in ("generator", "fake_score", "discriminator", "average")
    }
    return {
        "metrics": metrics,
        "digests": sorted(hashlib.sha256(value.numpy().tobytes()).hexdigest()[:16] for value in trained.values()),
        "norm": float(torch.stack([value.double().square().sum() for value in trained.values()]).sum().sqrt()),
    }


def machine() -> dict[str, str]:
    """What exact equality depends on besides the code."""
    flags = Path("/proc/cpuinfo")
    text = flags.read_text() if flags.exists() else ""
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    kind = " ".join(sorted(flag for flag in line.split() if flag.startswith(("avx", "amx", "fma"))))
    vendor = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("vendor_id")), "")
    return {"torch": torch.__version__, "instructions": kind, "vendor": vendor}


def record(work: Path) -> dict[str, Any]:
    """All runs."""
    make_inputs(work)
    return {"machine": machine(), "runs": {name: record_run(name, work) for name in RUNS}}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        Path(sys.argv[1]).write_text(json.dumps(record(Path(place)), indent=1) + "\n", encoding="utf-8")
