"""Who takes part in distillation: teacher, generator, fake score, discriminator."""

import copy
from dataclasses import dataclass

from torch import nn

from fewstep.backbones.discriminator import Discriminator
from fewstep.diffusion.denoiser import Denoiser


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
