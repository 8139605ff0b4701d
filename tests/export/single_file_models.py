"""Tiny generators that are written as single files: whole networks and LoRAs of both families."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import fewstep
from fewstep.formats.model_folder import ModelCard
from fewstep.models.model import Model
from fewstep.networks.adapters import LoraShape, SharedBase
from tests.tiny_models import tiny_sd_folder, tiny_sdxl_folder


def sd_folder(path: Path, **options: Any) -> Path:
    return tiny_sd_folder(path, **options)


def sdxl_folder(path: Path, **options: Any) -> Path:
    """As `tiny_sdxl_folder`, with text encoders of different widths: diffusers tells them apart in a file by these."""
    tiny_sdxl_folder(path, **options)
    config = json.loads((path / "text_encoder_2/config.json").read_text(encoding="utf-8"))
    wider = CLIPTextConfig.from_dict({**config, "hidden_size": 40, "num_hidden_layers": 3})
    CLIPTextModelWithProjection(wider).eval().save_pretrained(path / "text_encoder_2")
    unet: Any = UNet2DConditionModel.from_pretrained(path / "unet")
    wide: Any = UNet2DConditionModel.from_config({**unet.config, "cross_attention_dim": 32 + 40})
    wide.save_pretrained(path / "unet")
    return path


FOLDERS = {"sd": sd_folder, "sdxl": sdxl_folder}


def load_generator(folder: Path, *steps: int, lora: bool = False) -> Model:
    """The teacher as a generator with these steps; a LoRA on it is filled with numbers that matter."""
    teacher = fewstep.load_teacher(folder, device="cpu")
    card = ModelCard("generator", steps, licence="openrail++", made_with={"recipe": "tiny"})
    if not lora:
        return teacher.student(teacher.denoiser, card)
    role = SharedBase(teacher.denoiser, LoraShape(rank=4, alpha=8.0)).add_role("generator")
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in role.parameters():
            parameter.normal_(0, 0.1)
    return teacher.student(role.eval(), card)
