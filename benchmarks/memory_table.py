"""Print the tables of docs/memory.md: estimated peak of a DMD2 step at batch 1, by memory mode.

    python benchmarks/memory_table.py                  both models, 24 rehearsed steps, about half an hour on one core
    python benchmarks/memory_table.py --models sd15    one of them

No GPU, no weights and no data are needed: every figure is a step rehearsed on shapes (fewstep/training/memory.py).
"""

import argparse

from fewstep.backbones.diffusers_shapes import VAE_NETWORK, build_released_denoiser
from fewstep.config import TrainSettings, parse_settings
from fewstep.training.memory import FROZEN, STATES, TRAINED, estimate_memory

GAN = {"gan_generator_weight": 5e-3, "gan_discriminator_weight": 1e-2}
MODELS = {  # title, settings of the published recipe that matter here
    "sd15": ("Stable Diffusion 1.5, 512x512", {"guidance_scale": 1.75}, [999]),
    "sdxl": ("SDXL, 1024x1024", {"guidance_scale": 8.0}, [999, 749, 499, 249]),
}
STORAGE = [("full", "fp32"), ("lora_generator", "bf16"), ("shared_base", "bf16")]


def settings_of(model: str, mode: str, frozen: str, checkpoint: bool, gan: bool) -> TrainSettings:
    """One row's settings: bf16 inside the networks, LoRA rank 64, no weight average."""
    _, teacher, indices = MODELS[model]
    values = {
        "teacher": {"network": model, **teacher}, "generator": {"step_indices": indices},
        "memory": {"mode": mode, "frozen_precision": frozen, "checkpoint_activations": checkpoint},
        "losses": GAN if gan else {}, "training": {"batch_size": 1},
    }  # fmt: skip
    return parse_settings(TrainSettings, values, "table")


def gib(size: int) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.1f}"


def print_table(model: str) -> None:
    """One model's table."""
    print(f"\n### {MODELS[model][0]}, batch 1\n")
    columns = ["without GAN", "without GAN, recomputed", "with GAN", "with GAN, recomputed"]
    print(f"| `memory.mode` | `frozen_precision` | weights and states | {' | '.join(columns)} |")
    print("| --- | --- | --- |" + " --- |" * len(columns), flush=True)
    denoiser = build_released_denoiser(model)
    for mode, frozen in STORAGE:
        peaks, kept = [], 0
        for gan in (False, True):
            for checkpoint in (False, True):
                settings = settings_of(model, mode, frozen, checkpoint, gan)
                estimate = estimate_memory(settings, denoiser, autoencoder=VAE_NETWORK, pictures=False)
                peaks.append(gib(estimate.step))
                kept = sum(estimate.kinds[estimate.phase][kind] for kind in (FROZEN, TRAINED, STATES))
        print(f"| `{mode}` | {frozen} | {gib(kept)} | {' | '.join(peaks)} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    for model in parser.parse_args().models:
        print_table(model)


if __name__ == "__main__":
    main()
