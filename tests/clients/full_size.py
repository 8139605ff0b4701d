"""A generator of the very shape of Stable Diffusion 1.5 with random weights: what other programs recognise by its tensors.

Nothing published is needed: the tokenizer knows the words of one prompt, under CLIP's own numbers.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from fewstep.families.stable_diffusion.shapes import SCHEDULER, SD15, VAE

PROMPT = "a photo of a cat"
WORDS = {"a</w>": 320, "photo</w>": 1125, "of</w>": 539, "cat</w>": 2368}
MERGES = ("c a", "ca t</w>", "o f</w>", "p h", "ph o", "pho t", "phot o</w>")
START, END, NUM_TOKENS = 49406, 49407, 49408


def write_folder(folder: Path) -> Path:
    """A diffusers folder, float32 in memory and float16 on disk, 2 GB."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(SD15["network"])
    with torch.no_grad():
        unet.conv_out.weight *= 8  # predicts noise of about unit size, so that the steps are not all alike
    unet.half().save_pretrained(folder / "unet")
    del unet
    vae = AutoencoderKL.from_config({**VAE, "sample_size": 512, "scaling_factor": 0.18215})
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 4  # pictures with light and dark
    vae.half().save_pretrained(folder / "vae")
    text = CLIPTextConfig(
        vocab_size=NUM_TOKENS, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=START, eos_token_id=END, projection_dim=768,
    )  # fmt: skip
    CLIPTextModel(text).half().save_pretrained(folder / "text_encoder")
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False,
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_tokenizer(folder: Path) -> None:
    """CLIP's numbers for the words of `PROMPT`; every other number has a word that nobody writes."""
    folder.mkdir(parents=True)
    letters = {letter: 2 * number for number, letter in enumerate("acfhopt")}
    parts = {**letters, **{f"{letter}</w>": number + 1 for letter, number in letters.items()}}
    parts |= {merge.replace(" ", ""): 40 + number for number, merge in enumerate(MERGES)}
    known = {**parts, **WORDS, "<|startoftext|>": START, "<|endoftext|>": END}
    taken = set(known.values())
    known |= {f"<unused{number}>": number for number in range(NUM_TOKENS) if number not in taken}
    (folder / "vocab.json").write_text(json.dumps(known))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    options = {**special, "pad_token": "<|endoftext|>", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
