"""The two non-saturating GAN losses on discriminator logits."""

import torch.nn.functional as F
from torch import Tensor


def generator_adversarial_loss(generated_logits: Tensor) -> Tensor:
    """mean softplus(-logit): small where the discriminator takes generated images for real.

    Source: Goodfellow et al. 2014 (arXiv:1406.2661), section 3; DMD2 (arXiv:2405.14867), section 4.3.

    Args:
        generated_logits: (B,), for generated images.
    """
    return F.softplus(-generated_logits).mean()


def discriminator_adversarial_loss(real_logits: Tensor, generated_logits: Tensor) -> Tensor:
    """mean softplus(logit of generated) + mean softplus(-logit of real).

    Source: as `generator_adversarial_loss`.

    Args:
        real_logits: (B,), for real images.
        generated_logits: (B,), for generated images.
    """
    return F.softplus(generated_logits).mean() + F.softplus(-real_logits).mean()
