"""Training inputs of a few-step generator: exactly what it will meet when it samples."""

import torch
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.step_schedule import StepSchedule


@torch.no_grad()
def simulated_input(
    generator: Denoiser, steps: StepSchedule, condition: Condition, draws: Draws
) -> tuple[Tensor, Tensor]:
    """Noisy input and level of one uniformly chosen step, the same on all processes.

    The current generator runs from pure noise through the steps before it, each with fresh noise; its x0 is then
    noised to the chosen step's level. At the first step the input is pure noise.
    Source: DMD2 (arXiv:2405.14867), section 4.5.

    Returns:
        noisy (B, C, H, W) and level (B,).
    """
    schedule, device = generator.noise_schedule, draws.positions.device
    chosen = draws.shared_integer("simulated_step", len(steps))

    def level(number: int) -> Tensor:
        return schedule.expanded(steps.indices[number], len(condition), device)

    noisy = schedule.initial(draws.normal("generator_noise", generator.image_shape), level(0))
    for number in range(chosen):
        x0 = generator.denoise(noisy, level(number), condition)
        noise = draws.normal("simulation_noise", generator.image_shape, number + 1)
        noisy = generator.add_noise(x0, noise, level(number + 1))
    return noisy, level(chosen)
