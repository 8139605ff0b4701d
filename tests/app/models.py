"""Tiny models for the page: text with a teacher, TAESD and safety checker; classes with a teacher."""

from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessorPil

from fewstep.formats.model_folder import ModelCard, write_model_folder
from tests.conftest import tiny_denoiser
from tests.export.text_generators import write_run
from tests.tiny_models import tiny_taesd_folder


def text_models(folder: Path) -> tuple[Path, Path, Path]:
    """A two-step run, its teacher, a TAESD."""
    run = write_run(folder, "sd", (999, 499))
    return run, folder / "teacher", tiny_taesd_folder(folder / "taesd")


def class_models(folder: Path) -> tuple[Path, Path]:
    """A two-step generator of four named classes, and its teacher."""
    cards = {
        "generator": ModelCard("generator", (999, 499), class_names=("coat", "bag", "boot", "hat")),
        "teacher": ModelCard("teacher", class_names=("coat", "bag", "boot", "hat"), can_be_guided=True),
    }
    for seed, (name, card) in enumerate(cards.items()):
        denoiser = tiny_denoiser(seed=seed)
        write_model_folder(folder / name, denoiser.describe(), denoiser.state_dict(), card)
    return folder / "generator", folder / "teacher"


def add_safety_checker(folder: Path, *, threshold: float) -> Path:
    """A tiny random checker in a model folder; cosines lie in [-1, 1], so threshold -2 flags all and 2 nothing."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**sizes, "image_size": 32, "patch_size": 8}, text_config={**sizes, "vocab_size": 50},
        projection_dim=12,
    )  # fmt: skip
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        checker.concept_embeds.normal_()
        checker.concept_embeds_weights.fill_(threshold)
    checker.save_pretrained(folder / "safety_checker", safe_serialization=True)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder / "feature_extractor")
    return folder
