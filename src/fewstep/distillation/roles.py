"""Who takes part in distillation: teacher, generator, fake score, discriminator."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from fewstep.diffusion.denoiser import Denoiser
from fewstep.networks.adapters import LoraShape, SharedBase
from fewstep.networks.discriminator import Discriminator


@dataclass
class Roles:
    """The networks of one distillation run.

    Attributes:
        teacher: frozen real score.
        generator: the student; trained.
        fake_score: score of the generator's distribution; trained.
        discriminator: GAN head on the fake score's bottleneck, or None where no term needs one.
    """

    teacher: Denoiser
    generator: Denoiser
    fake_score: Denoiser
    discriminator: Discriminator | None

    def fake_score_and_head(self) -> nn.ModuleList:
        """What the second optimiser trains."""
        modules: list[nn.Module] = [self.fake_score]
        return nn.ModuleList(modules if self.discriminator is None else [*modules, self.discriminator])


def build_roles(teacher: Denoiser, with_discriminator: bool) -> Roles:
    """Three full copies of the teacher's weights; generator and fake score are trained, without dropout."""
    generator, fake_score = copy.deepcopy(teacher), copy.deepcopy(teacher)
    for network in (generator, fake_score):
        network.eval().requires_grad_(True)  # eval: distillation uses no dropout
    teacher.eval().requires_grad_(False)
    device = next(teacher.parameters()).device
    head = Discriminator(teacher.bottleneck_shape).to(device) if with_discriminator else None
    return Roles(teacher, generator, fake_score, head)


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
