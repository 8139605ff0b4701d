"""Classifier-free guidance as one function over the condition."""

from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import Denoiser


def guided_denoise(
    denoiser: Denoiser, noisy: Tensor, level: Tensor, condition: Condition, guidance_scale: float
) -> Tensor:
    """x0 estimate under guidance: uncond + w (cond - uncond), so w = 1 is plain conditional denoising.

    Both branches go through one forward of twice the batch; w = 1 costs a single plain forward.

    Args:
        denoiser: the teacher.
        noisy, level: as `Denoiser.denoise` takes them.
        condition: the condition of the guided branch.
        guidance_scale: w. Source: Ho & Salimans 2022 (arXiv:2207.12598); some papers write w + 1 for it.

    Returns:
        (B, C, H, W), float32.
    """
    if guidance_scale == 1:
        return denoiser.denoise(noisy, level, condition)
    both = Condition.cat([condition.unconditional(), condition])
    x0 = denoiser.denoise(noisy.repeat(2, 1, 1, 1), level.repeat(2), both)
    unconditional, conditional = x0.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)
