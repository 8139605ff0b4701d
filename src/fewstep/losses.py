"""Every loss as a pure function of tensors: no module, no setting, no randomness inside."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.diffusion.per_sample import mean_per_sample, per_sample


def require_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError naming the tensors unless all have one shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def distribution_matching_gradient(x0: Tensor, real_x0: Tensor, fake_x0: Tensor) -> Tensor:
    """(fake_x0 - real_x0) / mean |x0 - real_x0|, per sample.

    Source: Yin et al. 2023, arXiv:2311.18828, eq. 7; normalised per sample as in its eq. 8.
    Differs: where x0 equals real_x0 everywhere the paper divides by zero; the gradient is 0 there.

    Args:
        x0: generator output, (B, ...).
        real_x0, fake_x0: the teacher's and the fake score's x0 estimates at one noise level, same shape. In float64 their
            difference, which may be a small part of them, is rounded after the division only.

    Returns:
        (B, ...), of x0's dtype, no gradient attached. A descent step along it moves x0 toward real_x0.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(x0=x0, real_x0=real_x0, fake_x0=fake_x0)
    with torch.no_grad():
        scale = mean_per_sample((x0 - real_x0).abs())
        direction = (fake_x0 - real_x0) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
        # NaN stays NaN, so that a diverging network is noticed
        return torch.where(scale == 0, 0.0, direction).to(x0.dtype)


def distribution_matching_loss(x0: Tensor, gradient: Tensor) -> Tensor:
    """Scalar whose gradient with respect to x0 is `gradient / numel`: 0.5 mse(x0, stop_grad(x0 - gradient)).

    Source: Yin et al. 2023, arXiv:2311.18828, section 3.2.

    Args:
        x0: generator output, (B, ...); the only input that receives gradient.
        gradient: `distribution_matching_gradient`, same shape.

    Returns:
        float32 scalar.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(x0=x0, gradient=gradient)
    return 0.5 * F.mse_loss(x0, (x0 - gradient).detach())


def divergence_weight(ratio: Tensor, divergence: str) -> Tensor:
    """h(r): what multiplies the distribution-matching gradient under another f-divergence than the reverse KL.

    Source: f-distill (arXiv:2502.15681), table 1; h(r) = f''(r) r^2 up to a factor.

    Args:
        ratio: r, density of the data over that of the generator, positive, any shape.
        divergence: a name of `DIVERGENCES`.

    Returns:
        as `ratio`.

    Raises:
        ValueError: the name is unknown.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence {divergence!r} is none of {', '.join(DIVERGENCES)}")
    return DIVERGENCES[divergence](ratio)


DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda ratio: ratio,
    "jensen_shannon": lambda ratio: ratio / (1 + ratio),
    "hellinger": torch.sqrt,
    "jeffreys": lambda ratio: 1 + ratio,
    "softened_reverse_kl": lambda ratio: 1 / (1 + ratio),
}


def denoising_loss(estimate: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
    """Mean over all elements of weight * (estimate - x0)^2.

    Source: Karras et al. 2022, arXiv:2206.00364, eq. 2 with the weight of its table 1.

    Args:
        estimate: x0 estimate of the model in training, (B, ...); receives gradient.
        x0: clean images, same shape.
        weight: `Denoiser.denoising_weight` at each sample's level, (B,).

    Returns:
        float32 scalar.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(estimate=estimate, x0=x0)
    return (per_sample(weight, x0) * (estimate - x0) ** 2).mean()


def generator_adversarial_loss(generated_logits: Tensor) -> Tensor:
    """mean softplus(-logit): small where the discriminator takes generated images for real.

    Source: Goodfellow et al. 2014 (arXiv:1406.2661), section 3; DMD2 (arXiv:2405.14867), section 4.3.

    Args:
        generated_logits: (B,), for generated images; (B, K) of K discriminators, whose losses are averaged.
    """
    return F.softplus(-generated_logits).mean()


def discriminator_adversarial_loss(real_logits: Tensor, generated_logits: Tensor) -> Tensor:
    """mean softplus(logit of generated) + mean softplus(-logit of real).

    Source: as `generator_adversarial_loss`.

    Args:
        real_logits: (B,), for real images; (B, K) of K discriminators, whose losses are averaged.
        generated_logits: (B,), for generated images; (B, K) of K discriminators, whose losses are averaged.
    """
    return F.softplus(generated_logits).mean() + F.softplus(-real_logits).mean()


def regression_loss(x0: Tensor, target: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean perceptual distance between the generator's images and the teacher's from the same noise.

    Source: Yin et al. 2023, arXiv:2311.18828, eq. 9.

    Args:
        x0: generator output, (B, ...), in [-1, 1]; receives gradient.
        target: the teacher's deterministic samples for the same noise and condition, same shape.
        distance: (images, images) -> (B,), e.g. LPIPS.

    Returns:
        float32 scalar.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(x0=x0, target=target)
    return distance(x0, target).mean()
