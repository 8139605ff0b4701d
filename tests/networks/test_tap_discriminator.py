"""Light heads for features at several depths, each a discriminator of its own."""

import pytest
import torch

from fewstep.losses import discriminator_adversarial_loss, generator_adversarial_loss
from fewstep.networks.discriminator import LIGHT_WIDTH, Discriminator, TapDiscriminator, build_head, log_ratio

SHAPES = [(32, 8, 8), (24, 4, 4), (16, 16, 16)]


def test_one_feature_has_the_published_head() -> None:
    """Of its full width, under the names that earlier checkpoints have."""
    with torch.device("meta"):
        head, published = build_head([(768, 8, 8)]), Discriminator((768, 8, 8))
    assert type(head) is Discriminator
    assert {name: part.shape for name, part in head.state_dict().items()} == {
        name: part.shape for name, part in published.state_dict().items()
    }


def test_each_feature_has_a_head_of_its_own() -> None:
    torch.manual_seed(0)
    head = build_head(SHAPES)
    assert isinstance(head, TapDiscriminator)
    features = [torch.randn(3, *shape, requires_grad=True) for shape in SHAPES]
    logits = head(*features)
    assert logits.shape == (3, len(SHAPES))
    for number, (own, feature) in enumerate(zip(head.heads, features, strict=True)):
        torch.testing.assert_close(logits[:, number], own(feature))
        (gradient,) = torch.autograd.grad(logits[:, number].sum(), [feature], retain_graph=True)
        assert gradient.abs().sum() > 0
    discriminator_adversarial_loss(logits, logits + 1).backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in head.parameters())


def test_losses_are_averaged_over_heads_and_ratios_are_their_mean() -> None:
    real, generated = torch.randn(2, 5, 3, dtype=torch.float64)
    single = [discriminator_adversarial_loss(real[:, n], generated[:, n]) for n in range(3)]
    torch.testing.assert_close(discriminator_adversarial_loss(real, generated), torch.stack(single).mean())
    single = [generator_adversarial_loss(generated[:, n]) for n in range(3)]
    torch.testing.assert_close(generator_adversarial_loss(generated), torch.stack(single).mean())
    torch.testing.assert_close(log_ratio(real), real.mean(1))
    assert torch.equal(log_ratio(real[:, 0]), real[:, 0])


def test_wide_features_are_projected_and_narrow_ones_are_not() -> None:
    with torch.device("meta"):
        narrow, wide = TapDiscriminator([(64, 8, 8), (LIGHT_WIDTH + 64, 8, 8)]).heads
        same = Discriminator((64, 8, 8))
        z_image = TapDiscriminator([(3840, 64, 64)] * 3)
        published = Discriminator((3840, 64, 64))
    assert [part.shape for part in narrow.parameters()] == [part.shape for part in same.parameters()]
    assert wide[0].weight.shape == (LIGHT_WIDTH, LIGHT_WIDTH + 64, 1, 1)  # type: ignore[index,union-attr]
    counts = [sum(part.numel() for part in head.parameters()) for head in (z_image, published)]
    assert counts[0] < 20e6
    assert counts[1] > 1.1e9


def test_another_number_of_features_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        build_head(SHAPES)(torch.randn(1, *SHAPES[0]))
