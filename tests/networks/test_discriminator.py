import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.networks.discriminator import Discriminator, discriminator_groups

PUBLISHED = {  # bottleneck -> kernel, stride, padding of the convolutions before the last
    (768, 8, 8): [((4, 4), 2, 1), ((4, 4), 1, 0)],  # EDM ImageNet-64
    (1280, 8, 8): [((4, 4), 2, 1), ((4, 4), 1, 0)],  # SD 1.5
    (1280, 32, 32): [((4, 4), 2, 1)] * 3 + [((4, 4), 1, 0)],  # SDXL
}
OTHERS = {
    (32, 4, 4): [((4, 4), 1, 0)],
    (32, 2, 2): [((2, 2), 1, 0)],
    (32, 1, 1): [((1, 1), 1, 0)],
    (32, 5, 3): [((4, 4), 2, 1), ((2, 1), 1, 0)],
    (32, 3, 4): [((3, 4), 1, 0)],
    (32, 6, 6): [((4, 4), 2, 1), ((3, 3), 1, 0)],
    (32, 7, 7): [((4, 4), 2, 1), ((3, 3), 1, 0)],
    (32, 16, 8): [((4, 4), 2, 1), ((4, 4), 2, 1), ((4, 2), 1, 0)],
}


def meta_head(shape: tuple[int, int, int]) -> Discriminator:
    with torch.device("meta"):
        return Discriminator(shape)


@pytest.mark.parametrize(("shape", "convolutions"), [*PUBLISHED.items(), *OTHERS.items()])
def test_layers_of_a_bottleneck(shape: tuple[int, int, int], convolutions: list[tuple]) -> None:  # type: ignore[type-arg]
    channels, height, width = shape
    head = meta_head(shape)
    layers = list(head)
    assert len(layers) == 3 * len(convolutions) + 1
    for number, (kernel, stride, padding) in enumerate(convolutions):
        convolution, norm, activation = layers[3 * number : 3 * number + 3]
        assert convolution.weight.shape == (channels, channels, *kernel)
        assert convolution.bias is not None
        assert (convolution.stride, convolution.padding) == ((stride, stride), (padding, padding))
        assert isinstance(norm, nn.GroupNorm)
        assert (norm.num_groups, norm.num_channels, norm.eps) == (discriminator_groups(channels), channels, 1e-5)
        assert isinstance(activation, nn.SiLU)
    assert layers[-1].weight.shape == (1, channels, 1, 1)
    assert layers[-1].bias.shape == (1,)
    before_last = nn.Sequential(*layers[:-1])(torch.empty(2, *shape, device="meta"))
    assert before_last.shape == (2, channels, 1, 1)
    assert head(torch.empty(2, channels, height, width, device="meta")).shape == (2,)


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [((768, 8, 8), [0, 1, 3, 4, 6]), ((1280, 32, 32), [0, 1, 3, 4, 6, 7, 9, 10, 12]), ((32, 4, 4), [0, 1, 3])],
)
def test_keys_number_the_layers(shape: tuple[int, int, int], numbers: list[int]) -> None:
    expected = {f"{number}.{kind}" for number in numbers for kind in ("weight", "bias")}
    assert set(meta_head(shape).state_dict()) == expected


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1280, 32), (768, 32), (128, 32), (96, 16), (64, 16), (32, 8), (48, 8), (16, 4), (12, 2), (8, 2), (4, 1), (6, 1)],
)
def test_groups_are_32_or_leave_four_channels_each(channels: int, groups: int) -> None:
    assert discriminator_groups(channels) == groups
    assert channels % groups == 0
    assert channels // groups >= 4


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 7, 320, 1000])
def test_every_number_of_channels_has_groups(channels: int) -> None:
    groups = discriminator_groups(channels)
    assert channels % groups == 0
    assert groups == 1 or channels // groups >= 4


def reference(head: Discriminator, feature: Tensor, strides: list[int]) -> Tensor:
    """METHOD section 2 in float64, with GroupNorm spelled out."""
    weights = {name: value.double() for name, value in head.state_dict().items()}
    x = feature.double()
    for number, stride in enumerate(strides):
        convolution, norm = f"{3 * number}.", f"{3 * number + 1}."
        x = F.conv2d(x, weights[convolution + "weight"], weights[convolution + "bias"], stride, int(stride == 2))
        groups = x.reshape(len(x), discriminator_groups(x.shape[1]), -1)
        spread = groups.var(2, unbiased=False, keepdim=True)
        x = ((groups - groups.mean(2, keepdim=True)) / (spread + 1e-5).sqrt()).reshape(x.shape)
        x = x * weights[norm + "weight"][:, None, None] + weights[norm + "bias"][:, None, None]
        x = x / (1 + torch.exp(-x))
    last = 3 * len(strides)
    return (x[:, :, 0, 0] @ weights[f"{last}.weight"][0, :, 0, 0]) + weights[f"{last}.bias"]


@pytest.mark.parametrize(
    ("shape", "strides"), [((16, 8, 8), [2, 1]), ((32, 5, 3), [2, 1]), ((32, 2, 2), [1]), ((16, 16, 16), [2, 2, 1])]
)
def test_forward_against_float64(shape: tuple[int, int, int], strides: list[int]) -> None:
    torch.manual_seed(0)
    head = Discriminator(shape)
    with torch.no_grad():
        for parameter in head.parameters():  # norms start at 1 and 0, which would hide a wrong order
            parameter.add_(0.1 * torch.randn_like(parameter))
    feature = torch.randn(3, *shape)
    logits = head(feature)
    assert logits.shape == (3,)
    torch.testing.assert_close(logits.double(), reference(head, feature, strides), rtol=1e-4, atol=1e-5)


def test_logits_are_float32_of_each_image_alone() -> None:
    torch.manual_seed(0)
    head, feature = Discriminator((16, 4, 4)), torch.randn(4, 16, 4, 4)
    logits = head(feature)
    assert head(feature.bfloat16()).dtype == logits.dtype == torch.float32
    torch.testing.assert_close(torch.cat([head(feature[i : i + 1]) for i in range(4)]), logits)


def gradient_of_logits(head: Discriminator, feature: Tensor) -> Tensor:
    feature = feature.clone().requires_grad_(True)
    head(feature).sum().backward()
    return feature.grad


@pytest.mark.parametrize("channels", [4, 8, 16, 32, 64])
def test_a_narrow_head_keeps_a_gradient(channels: int) -> None:
    """At 1x1 pixels a group of one channel normalises to a constant: such a head has no gradient at all."""
    torch.manual_seed(0)
    head, feature = Discriminator((channels, 4, 4)), torch.randn(4, channels, 4, 4)
    sizes = gradient_of_logits(head, feature).flatten(1).norm(dim=1)
    assert sizes.min() > 0.02
    head[1] = nn.GroupNorm(channels, channels)
    assert gradient_of_logits(head, feature).flatten(1).norm(dim=1).max() < 1e-4 * sizes.min()


def test_gradient_reaches_every_parameter() -> None:
    head = Discriminator((32, 8, 8))
    head(torch.randn(3, 32, 8, 8)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in head.parameters())
