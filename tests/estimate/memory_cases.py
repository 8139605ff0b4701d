"""Small text-to-image networks whose training step is measured, for tests/estimate/test_memory.py and by hand.

What is measured: the bytes that torch's own CPU allocator has handed out and not got back, as torch.profiler reports
every allocation and free since before the networks were built. Not the resident memory of the process: that also
holds what libraries and the C allocator keep.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fewstep.devices import prepare_denoiser
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draws import Draws
from fewstep.distillation.inputs import RealBatch
from fewstep.families.registry import build_on_meta
from fewstep.formats.model_folder import ModelCard
from fewstep.models.conditioner import PromptTable
from fewstep.models.model import build_model
from fewstep.networks.text_encoders import TextEmbeddings
from fewstep.settings import TrainSettings, parse_settings
from fewstep.training.build import build_distillation
from fewstep.training.step import two_time_scale_step

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIZES = {
    "one level": (32, 8),
    "small": (32, 16),
    "middle": (64, 16),
    "large": (96, 24),
}  # channels, side of the latents

Z_IMAGE: dict[str, Any] = {
    "family": "z-image", "latent_size": 16, "scheduler": {"num_train_timesteps": 1000, "shift": 6.0},
    "network": {
        "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 96, "n_layers": 2, "n_refiner_layers": 1,
        "n_heads": 4, "n_kv_heads": 4, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 64, "rope_theta": 256.0,
        "t_scale": 1000.0, "axes_dims": (8, 8, 8), "axes_lens": (1024, 32, 32),
    },
}  # fmt: skip


def description(size: str) -> dict[str, Any]:
    """An SDXL-like U-Net: attention on the lower level or the only one, pooled embeddings and time ids; or a network like Z-Image's."""
    if size == "z-image":
        return Z_IMAGE
    channels, side = SIZES[size]
    network: dict[str, Any] = {
        "sample_size": side, "in_channels": 4, "out_channels": 4, "block_out_channels": (channels, 2 * channels),
        "layers_per_block": 1, "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 64,
        "attention_head_dim": (2, 4), "use_linear_projection": True, "transformer_layers_per_block": (1, 1),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    }  # fmt: skip
    if size == "one level":
        network |= {
            "block_out_channels": (channels,), "attention_head_dim": (2,), "transformer_layers_per_block": (1,),
            "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
        }  # fmt: skip
    return {"family": "diffusers-unet", "latent_size": side, "network": network, "scheduler": BETAS}


def case_settings(mode: str, batch_size: int, **memory: Any) -> TrainSettings:
    """Four-step DMD2 with GAN and guidance on the CPU."""
    precision, taps = memory.pop("precision", "fp32"), memory.pop("gan_taps", (0.5,))
    return parse_settings(
        TrainSettings,
        {
            "teacher": {"guidance_scale": 3.0},
            "generator": {"step_indices": [999, 749, 499, 249]},
            "memory": {"mode": mode, "lora_rank": 8, **memory},
            "losses": {"gan_generator_weight": 5e-3, "gan_discriminator_weight": 1e-2, "gan_taps": list(taps)},
            "training": {"batch_size": batch_size, "generator_every": 1},
            "compute": {"device": "cpu", "precision": precision},
            "run": {"sample_images": 1},
        },
        "test",
    )


class Embeddings:
    """Three prompts of 77 tokens, or of 512 and no pooled embedding, as estimates take Z-Image's."""

    def __init__(self, family: str) -> None:
        self.has_lengths = family == "z-image"

    def __len__(self) -> int:
        return 3

    def rows(self, index: torch.Tensor) -> TextEmbeddings:
        if self.has_lengths:
            return TextEmbeddings(torch.randn(len(index), 512, 64), lengths=torch.full((len(index),), 512))
        return TextEmbeddings(torch.randn(len(index), 77, 64), torch.randn(len(index), 24))


def built_step(settings: TrainSettings, network: Denoiser) -> Callable[[int], None]:
    """What `fewstep train` builds of a loaded teacher; the function makes a step of a number."""
    prepare_denoiser(network, "cpu", settings.compute.precision)
    teacher = build_model(network, ModelCard(role="teacher", can_be_guided=True))
    source, size = Embeddings(teacher.family.name), (128, 128)
    table = PromptTable(source, source.rows(torch.zeros(1)), teacher.family, size)
    run = build_distillation(settings, teacher, table)
    batch = settings.training.batch_size

    def make(step: int) -> None:
        draws = Draws.of_batch(0, step, batch)
        captions = table.rows(torch.zeros(batch, dtype=torch.int64))
        real = RealBatch(torch.randn(batch, *network.image_shape), captions)
        two_time_scale_step(run, step, real, draws)

    return make


def train_two_steps(settings: TrainSettings, network: Denoiser) -> None:
    """The optimisers' states exist in the second."""
    make = built_step(settings, network)
    for step in range(2):
        make(step)


def drawn_network(size: str) -> Denoiser:
    """A network of a size, with small random weights."""
    network = build_on_meta(description(size)).to_empty(device="cpu")
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return network


def measured_peak(settings: TrainSettings, size: str) -> int:
    """Peak of live bytes while a network of this size is built and trained."""
    gc.collect()  # what an earlier case left in reference cycles must not be freed, and counted, here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        train_two_steps(settings, drawn_network(size))
    return peak_of(profiler)


def peak_of(profiler: profile) -> int:
    """Peak of live bytes in what a profiler recorded.

    A buffer whose last holder is a thread of gloo's is given back there, where torch's profiler does not look (up to 40 MB
    of 150 in a run of four processes, another number each time). Its address is handed out again, and that ends it here.
    """
    live: dict[int, int] = {}
    now = peak = 0
    for address, size in _allocations(profiler):
        now -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            now += size
            peak = max(peak, now)
    return peak


def _allocations(profiler: profile) -> list[tuple[int, int]]:
    """Address and bytes of each allocation in order of time; the bytes are below zero where it is given back."""
    events, found = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.name == "[memory]":
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=lambda allocation: allocation[0])]
