"""The plain reading of METHOD section 3, which the library's step is measured against.

Lean, so that the comparison is fair: networks stop at the bottleneck where only the feature is needed, and whatever a
turn does not train is frozen. Otherwise as one would first write it down: eager, one forward for each quantity (guided
and unguided rows, real and generated images apart), one backward through the sum of the losses, default AdamW.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.draws import Draws
from fewstep.distillation.inputs import RealBatch
from fewstep.training.step import Distillation

GAN_GENERATOR_WEIGHT, GAN_DISCRIMINATOR_WEIGHT, MAX_GRAD_NORM = 3e-3, 1e-2, 10.0


class PlainStep:
    """One two time-scale step over the networks, inputs and draws of a distillation, with optimisers of its own.

    Args:
        run: its networks are trained in place; their compute precision is the caller's choice.
        guidance_scale: of the teacher; 1 is off.
        optimizer: made as (parameters, lr); the default is AdamW as torch makes it.
    """

    def __init__(self, run: Distillation, guidance_scale: float = 1.0, optimizer: type = torch.optim.AdamW) -> None:
        self.roles, self.inputs, self.every, self.guidance_scale = (
            run.roles,
            run.inputs,
            run.generator_every,
            guidance_scale,
        )
        self.trained = list(run.roles.fake_score_parameters().values())
        self.generator_optimizer = optimizer(list(run.roles.generator.parameters()), lr=1e-5)
        self.fake_score_optimizer = optimizer(self.trained, lr=1e-5)

    def __call__(self, step: int, real: RealBatch, draws: Draws) -> None:
        """Generator's turn every `every`-th step, fake score and head always."""
        generator = self.roles.generator
        batch = self.inputs(generator, draws, real)
        if step % self.every == 0:
            for parameter in self.trained:
                parameter.requires_grad_(False)
            x0 = generator.denoise(batch.noisy, batch.level, batch.condition)
            self.generator_loss(x0, batch.condition, draws).backward()
            _update(self.generator_optimizer)
            for parameter in self.trained:
                parameter.requires_grad_(True)
        else:
            with torch.no_grad():
                x0 = generator.denoise(batch.noisy, batch.level, batch.condition)
        self.fake_score_loss(x0.detach(), batch.condition, real, draws).backward()
        _update(self.fake_score_optimizer)

    def generator_loss(self, x0: Tensor, condition: Condition, draws: Draws) -> Tensor:
        """Distribution matching and GAN loss of the generator."""
        teacher, fake_score = self.roles.teacher, self.roles.fake_score
        with torch.no_grad():
            noisy, level = self.noised(x0, draws, "dm", 20, 981)
            real = teacher.denoise(noisy, level, condition)
            if self.guidance_scale != 1:
                unconditional = teacher.denoise(noisy, level, condition.unconditional())
                real = unconditional + self.guidance_scale * (real - unconditional)
            fake = fake_score.denoise(noisy, level, condition)
            gradient = (fake - real) / (x0 - real).abs().mean(dim=(1, 2, 3), keepdim=True)
        loss = 0.5 * F.mse_loss(x0, (x0 - gradient).detach())
        return loss + GAN_GENERATOR_WEIGHT * F.softplus(-self.logits(x0, condition, draws, "gan")).mean()

    def fake_score_loss(self, x0: Tensor, condition: Condition, real: RealBatch, draws: Draws) -> Tensor:
        """Denoising and discriminator loss."""
        noisy, level = self.noised(x0, draws, "fake")
        estimate = self.roles.fake_score.denoise(noisy, level, condition)
        weight = self.roles.fake_score.denoising_weight(level)[:, None, None, None]
        loss = (weight * (estimate - x0) ** 2).mean()
        on_real = self.logits(real.images, real.condition, draws, "disc", of="_real")
        on_generated = self.logits(x0, condition, draws, "disc", of="_generated")
        return loss + GAN_DISCRIMINATOR_WEIGHT * (F.softplus(-on_real).mean() + F.softplus(on_generated).mean())

    def noised(
        self, x0: Tensor, draws: Draws, name: str, low: int = 0, high: int = 1000, of: str = ""
    ) -> tuple[Tensor, Tensor]:
        """Images at their own random levels, and these levels."""
        schedule = self.roles.teacher.noise_schedule
        level = schedule.at(draws.integers(f"{name}_level{of}", low, high))  # type: ignore[arg-type]
        noise = draws.normal(f"{name}_noise{of}", tuple(x0.shape[1:]))  # type: ignore[arg-type]
        return schedule.add_noise(x0, noise, level), level

    def logits(self, images: Tensor, condition: Condition, draws: Draws, name: str, of: str = "") -> Tensor:
        """The discriminator's on noised images."""
        assert self.roles.discriminator is not None
        noisy, level = self.noised(images, draws, name, of=of)
        return self.roles.discriminator(self.roles.fake_score.features(noisy, level, condition)[0])


def _update(optimizer: torch.optim.Optimizer) -> None:
    parameters: list[nn.Parameter] = optimizer.param_groups[0]["params"]
    nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
