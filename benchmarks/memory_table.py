"""Print the tables of docs/memory.md: estimated peak of a DMD2 step at batch 1, by memory mode.

    python benchmarks/memory_table.py                  both models, 24 rehearsed steps, under ten minutes on one core
    python benchmarks/memory_table.py --models sd15    one of them
    python benchmarks/memory_table.py --recipe recipes/sdxl_dmd2_4step_one_gpu.toml    a whole run, with and without GAN

No GPU, no weights and no data are needed: every figure is a run rehearsed on shapes (fewstep/estimate/memory.py).
"""

import argparse
from pathlib import Path
from typing import Any

from fewstep.diffusion.denoiser import Denoiser
from fewstep.estimate.memory import (
    FAKE_SCORE_TURN,
    FROZEN,
    GENERATOR_TURN,
    PICTURES,
    STATES,
    TRAINED,
    estimate_run,
)
from fewstep.families.registry import build_released, family_of
from fewstep.settings import TrainSettings, load_settings, parse_settings

GAN = {"gan_weights": [5e-3, 1e-2]}
MODELS = {  # title, settings of the published recipe that matter here
    "sd15": ("Stable Diffusion 1.5, 512x512", {"guidance_scale": 1.75}, [999]),
    "sdxl": ("SDXL, 1024x1024", {"guidance_scale": 8.0}, [999, 749, 499, 249]),
}
PHASES = (GENERATOR_TURN, FAKE_SCORE_TURN, PICTURES)
STORAGE = [("full", "fp32"), ("lora_generator", "bf16"), ("shared_base", "bf16")]


def settings_of(model: str, mode: str, frozen: str, checkpoint: bool, gan: bool) -> TrainSettings:
    """One row's settings: bf16 inside the networks, LoRA rank 64, no weight average."""
    _, teacher, indices = MODELS[model]
    values = {
        "teacher": {"network": model, **teacher}, "generator": {"step_indices": indices},
        "memory": {"mode": mode, "base": frozen, "checkpoint_activations": checkpoint},
        "losses": GAN if gan else {}, "training": {"batch_size": 1},
    }  # fmt: skip
    return parse_settings(TrainSettings, values, "table")


def vae_of(denoiser: Denoiser) -> dict[str, Any]:
    """The released models' VAE."""
    return dict(family_of(denoiser.describe()).autoencoder_config)


def gib(size: int) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.1f}"


def print_table(model: str) -> None:
    """One model's table."""
    print(f"\n### {MODELS[model][0]}, batch 1\n")
    columns = ["without GAN", "without GAN, recomputed", "with GAN", "with GAN, recomputed"]
    print(f"| `memory.mode` | `base` | weights and states | {' | '.join(columns)} |")
    print("| --- | --- | --- |" + " --- |" * len(columns), flush=True)
    denoiser = build_released(model)
    for mode, frozen in STORAGE:
        peaks, kept = [], 0
        for gan in (False, True):
            for checkpoint in (False, True):
                settings = settings_of(model, mode, frozen, checkpoint, gan)
                estimate = estimate_run(settings, denoiser, autoencoder=vae_of(denoiser), pictures=False)
                peaks.append(gib(estimate.step))
                kept = sum(estimate.kinds[estimate.phase][kind] for kind in (FROZEN, TRAINED, STATES))
        print(f"| `{mode}` | {frozen} | {gib(kept)} | {' | '.join(peaks)} |", flush=True)


def print_recipe(recipe: Path) -> None:
    """A whole run of a recipe for a released text-to-image model: its steps and its sample pictures, VAE included."""
    print(f"\n### {recipe.stem}\n")
    print("| | weights and states | " + " | ".join(PHASES) + " | whole run |")
    print("| --- | --- |" + " --- |" * (len(PHASES) + 1), flush=True)
    no_gan = ["losses.gan_weights=[0, 0]"]
    for name, overrides in (("without GAN", no_gan), ("with GAN", [])):
        settings = load_settings(TrainSettings, recipe, overrides)
        denoiser = build_released(settings.teacher.network, settings.teacher.resolution)
        estimate = estimate_run(settings, denoiser, autoencoder=vae_of(denoiser))
        kept = sum(estimate.kinds[PICTURES][kind] for kind in (FROZEN, TRAINED, STATES))
        peaks = [estimate.peaks[phase] for phase in PHASES]
        print(f"| {name} | {' | '.join(gib(size) for size in (kept, *peaks, max(peaks)))} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--recipe", type=Path)
    arguments = parser.parse_args()
    if arguments.recipe is not None:
        print_recipe(arguments.recipe)
        return
    for model in arguments.models:
        print_table(model)


if __name__ == "__main__":
    main()
