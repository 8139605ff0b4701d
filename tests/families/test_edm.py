import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.condition import Condition
from fewstep.diffusion.denoiser import plain_checkpoint
from fewstep.errors import UserError
from fewstep.families.edm.denoiser import EDMDenoiser
from fewstep.families.edm.folder import describe_edm_arguments
from fewstep.families.edm.unet import EDMUNet, EDMUNetConfig, UNetBlock
from tests.conftest import golden_denoiser, relative_error, tiny_denoiser


@pytest.mark.parametrize("family", ["adm", "ddpmpp", "ncsnpp"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-6)])
def test_golden_networks(family: str, dtype: torch.dtype, tolerance: float) -> None:
    denoiser, golden = golden_denoiser(family)
    denoiser = denoiser.to(dtype)
    condition = Condition(len(golden["noisy"]))
    if "class_labels" in golden:
        condition = Condition.from_one_hot(golden["class_labels"].to(dtype))
    with torch.no_grad():
        both = denoiser(golden["noisy"].to(dtype), golden["sigma"].to(dtype), condition, "both")
        alone = denoiser.features(golden["noisy"].to(dtype), golden["sigma"].to(dtype), condition)[0]
    assert relative_error(both.x0, golden["denoised"]) < tolerance
    assert torch.equal(both.features[0], alone)
    if "bottleneck" in golden:
        assert relative_error(both.features[0], golden["bottleneck"]) < tolerance


@pytest.mark.slow
def test_bf16_stays_inside_the_network() -> None:
    denoiser, golden = golden_denoiser("adm")
    condition = Condition.from_one_hot(golden["class_labels"])
    with torch.no_grad():
        exact = denoiser.denoise(golden["noisy"], golden["sigma"], condition)
        denoiser.compute_dtype = torch.bfloat16
        out = denoiser(golden["noisy"], golden["sigma"], condition, "both")
    assert out.x0.dtype == out.features[0].dtype == torch.float32
    error = relative_error(out.x0, exact)
    assert 0 < error < 0.02


def test_feature_alone_leaves_the_decoder_out() -> None:
    denoiser = tiny_denoiser()
    called = []
    denoiser.model.dec["8x8_up"].register_forward_hook(lambda *_: called.append(1))
    noisy, level, condition = torch.randn(2, 1, 16, 16), torch.ones(2), Condition.from_labels(torch.zeros(2), 4)
    denoiser.features(noisy, level, condition)[0]
    assert not called
    denoiser.denoise(noisy, level, condition)
    assert called


def test_folding_is_a_configuration_and_keeps_the_picture_shape() -> None:
    config = EDMUNetConfig("adm", 16, 3, 0, 16, (1, 2), 2, 1, (4,), fold=2)
    net = EDMUNet(config)
    out, feature = net(torch.randn(2, 3, 16, 16), torch.zeros(2), None, "both")
    assert out.shape == (2, 3, 16, 16)
    assert feature[0].shape[1:] == net.tap_shapes[net.middle] == (32, 4, 4)
    assert net.enc["8x8_conv"].weight.shape[1] == 12


def test_attention_matches_its_formula() -> None:
    net = tiny_denoiser().model.double()
    block = net.dec["4x4_in0"]
    x = torch.randn(2, block.out_channels, 4, 4, dtype=torch.float64)
    qkv = torch.nn.functional.conv2d(block.norm2(x), block.qkv.weight, block.qkv.bias)
    q, k, v = qkv.reshape(2, block.heads, -1, 3, 16).unbind(3)
    weights = torch.einsum("bhcq,bhck->bhqk", q, k / q.shape[2] ** 0.5).softmax(-1)
    a = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(x.shape)
    expected = x + torch.nn.functional.conv2d(a, block.proj.weight, block.proj.bias)
    torch.testing.assert_close(block._attend(x), expected, rtol=1e-10, atol=1e-10)


def test_impossible_resolution_names_the_setting() -> None:
    with pytest.raises(ValueError, match=r"network.img_resolution=20 must be a multiple of 8"):
        EDMUNetConfig("adm", 20, 3, channel_mult=(1, 1, 1), fold=2)


def gradients(denoiser: EDMDenoiser, seed: int = 0) -> list[Tensor]:
    """Of every parameter, through x0 and feature."""
    torch.manual_seed(seed)
    noisy, level = torch.randn(2, *denoiser.image_shape), torch.tensor([0.3, 20.0])
    torch.manual_seed(seed + 1)  # of dropout
    out = denoiser(noisy, level, Condition.from_labels(torch.tensor([1, 3]), denoiser.num_classes), "both")
    (out.x0.square().sum() + out.features[0].sum()).backward()
    return [parameter.grad.clone() for parameter in denoiser.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("mode", ["eval", "train with dropout"])
def test_recomputed_activations_give_the_same_gradients(mode: str) -> None:
    kept, recomputed = tiny_denoiser(), tiny_denoiser()
    recomputed.checkpoint_activations()
    for denoiser in (kept, recomputed):
        if mode != "eval":
            for block in denoiser.train().blocks():
                block.dropout = 0.3
    pairs = list(zip(gradients(kept), gradients(recomputed), strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    if mode != "eval":
        plain = gradients(tiny_denoiser())
        assert not all(torch.equal(ours, theirs[0]) for ours, theirs in zip(plain, pairs, strict=True))


def test_every_block_is_recomputed_and_nothing_without_gradients() -> None:
    denoiser, called = tiny_denoiser(), list[torch.nn.Module]()

    def checkpoint(block: torch.nn.Module, *inputs: Tensor) -> Tensor:
        called.append(block)
        return plain_checkpoint(block, *inputs)

    denoiser.checkpoint_activations(checkpoint)
    with torch.no_grad():
        denoiser.denoise(torch.randn(1, *denoiser.image_shape), torch.tensor([1.0]), Condition(1))
    assert not called
    denoiser.denoise(torch.randn(1, *denoiser.image_shape), torch.tensor([1.0]), Condition(1)).sum().backward()
    assert called == denoiser.blocks()
    assert len(called) == len(set(called)) == sum(isinstance(module, UNetBlock) for module in denoiser.modules())


@pytest.mark.parametrize("name", ["channel_mult", "attn_resolutions", "resample_filter"])
def test_lists_of_the_network_hold_numbers(name: str) -> None:
    with pytest.raises(ValueError, match=rf"network.{name}=.* must be numbers"):
        EDMUNetConfig.from_dict({"family": "song", "img_resolution": 16, "img_channels": 1, name: [1, {"a": 1}]})


@pytest.mark.parametrize(
    ("name", "value"),
    [("adaptive_scale", False), ("decoder_type", "skip"), ("sigma_max", 10.0), ("sigma_min", 0.1), ("of_tomorrow", 3)],
)
def test_constructor_arguments_are_known_or_refused_by_name(name: str, value: Any) -> None:
    """Of an EDM pickle: what is left out would be another network, or another range of noise levels."""
    known: dict[str, Any] = {"img_resolution": 16, "img_channels": 3, "label_dim": 4}
    plain = {"use_fp16": True, "label_dropout": 0.1, "decoder_type": "standard", "sigma_min": 0, "sigma_max": math.inf}
    assert describe_edm_arguments({**known, **plain}) == describe_edm_arguments(known)
    with pytest.raises(UserError, match=f"EDM network with {name}={value}, which this version does not understand"):
        describe_edm_arguments({**known, name: value})
