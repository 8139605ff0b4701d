"""Roles that share one frozen network through LoRA adapters."""

import copy

import torch

from fewstep.backbones.adapters import LoraShape, SharedBase
from fewstep.backbones.diffusers_denoiser import DiffusersDenoiser
from fewstep.backbones.discriminator import Discriminator
from fewstep.diffusion.denoiser import Denoiser
from fewstep.distillation.roles import Roles
from fewstep.errors import UserError


def build_lora_generator_roles(
    teacher: Denoiser, lora: LoraShape, with_discriminator: bool, frozen_dtype: torch.dtype, checkpoint: bool
) -> Roles:
    """The generator is a LoRA on the frozen teacher; the fake score is a full float32 network of its own.

    Args:
        frozen_dtype: how the frozen weights are stored.
        checkpoint: whether activations are recomputed in the backward pass.
    """
    head = _head(teacher, with_discriminator)
    fake_score = copy.deepcopy(teacher).eval().requires_grad_(True)
    if checkpoint:
        if not isinstance(fake_score, DiffusersDenoiser):
            raise UserError("memory.checkpoint_activations=true: this model family cannot recompute its activations")
        fake_score.checkpoint_activations()
    shared = _shared_base(teacher, lora, frozen_dtype, checkpoint)
    return Roles(teacher, shared.add_role("generator"), fake_score, head)


def build_shared_base_roles(
    teacher: Denoiser, lora: LoraShape, with_discriminator: bool, frozen_dtype: torch.dtype, checkpoint: bool
) -> Roles:
    """One copy of the weights: teacher bare, generator and fake score each under its own LoRA."""
    head = _head(teacher, with_discriminator)
    shared = _shared_base(teacher, lora, frozen_dtype, checkpoint)
    generator, fake_score = shared.add_role("generator"), shared.add_role("fake_score")
    return Roles(teacher, generator, fake_score, head)


def _shared_base(teacher: Denoiser, lora: LoraShape, frozen_dtype: torch.dtype, checkpoint: bool) -> SharedBase:
    shared = SharedBase(teacher.eval().to(frozen_dtype), lora)
    if checkpoint:
        shared.checkpoint_activations()
    return shared


def _head(teacher: Denoiser, with_discriminator: bool) -> Discriminator | None:
    """Made before the adapters, so that its random start is the same in every memory mode."""
    device = next(teacher.parameters()).device
    return Discriminator(teacher.bottleneck_shape).to(device) if with_discriminator else None
