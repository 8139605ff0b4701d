"""Quantised layers are the layers of their weights, keep nothing but codes, and carry LoRAs as plain ones do."""

import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import computing_in
from fewstep.errors import UserError
from fewstep.models.load import load_teacher
from fewstep.networks import frozen_layers
from fewstep.networks.adapters import AdapterRole, LoraShape, SharedBase
from fewstep.networks.frozen_layers import Base, BaseStorage, FrozenConv2d, FrozenLayer, FrozenLinear
from fewstep.networks.quantised import quantise
from tests.conftest import tiny_denoiser
from tests.tiny_networks import some_levels, tiny_condition, tiny_text_denoiser

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import quantised_base

LAYERS: list[tuple[Any, tuple[int, ...]]] = [
    (lambda: nn.Linear(24, 10), (2, 5, 24)),
    (lambda: nn.Linear(24, 10, bias=False), (3, 24)),
    (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8)),
    (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=(0, 1), dilation=2, groups=2, bias=False), (2, 4, 9, 8)),
]


def frozen(layer: Any, kind: Any) -> FrozenLayer:
    return FrozenLinear(layer, kind) if isinstance(layer, nn.Linear) else FrozenConv2d(layer, kind)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_a_layer_is_the_layer_of_its_weight(make: Any, shape: tuple[int, ...], kind: Any) -> None:
    """Output and gradient at its input, in float64."""
    torch.manual_seed(0)
    plain = make().double().requires_grad_(False)
    small = frozen(plain, kind)
    plain.weight.copy_(small.weight_in(torch.float64))
    x, again = (torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(2))
    again.data.copy_(x.data)
    expected, found = plain(x), small(again)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(expected)
    expected.backward(direction)
    found.backward(direction)
    torch.testing.assert_close(again.grad, x.grad, rtol=1e-12, atol=1e-12)
    assert small.weight.shape == plain.weight.shape


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_autograd_keeps_no_weight(kind: Any) -> None:
    """Two layers of 256 x 256, and nothing as large as one of their weights is held for the backward pass."""
    small = nn.Sequential(*(frozen(nn.Linear(256, 256).requires_grad_(False), kind) for _ in range(2)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        small(torch.randn(1, 256).requires_grad_()).sum().backward()
    own = {buffer.data_ptr() for buffer in small.buffers()}
    assert sum(tensor.nbytes for tensor in kept if tensor.data_ptr() not in own) < 256 * 256


def test_autocast_and_half_inputs() -> None:
    """The output has the type that a plain layer's would have."""
    plain = nn.Linear(64, 8).requires_grad_(False)
    small = frozen(plain, "int8")
    with computing_in(torch.bfloat16, torch.device("cpu")):
        assert small(torch.randn(2, 64)).dtype == plain(torch.randn(2, 64)).dtype == torch.bfloat16
    assert small(torch.randn(2, 64, dtype=torch.float16)).dtype == torch.float16
    assert small(torch.randn(2, 64)).dtype == torch.float32


def test_what_is_stored_how() -> None:
    """Blocks in codes, convolutions never in four bits; the rest in the network's own precision; a second time nothing changes."""
    for dtype in (torch.float32, torch.bfloat16):
        network = tiny_text_denoiser("sdxl")
        network.compute_dtype = dtype
        BaseStorage("nf4").store(network)
        inside = [layer for block in network.blocks() for layer in block.modules()]
        assert not any(type(layer) in (nn.Linear, nn.Conv2d) for layer in inside)
        kinds = {(type(layer), layer.kind) for layer in inside if isinstance(layer, FrozenLayer)}
        assert kinds == {(FrozenLinear, "nf4"), (FrozenConv2d, "int8")}
        assert network.network.conv_in.weight.dtype == dtype
        assert {part.dtype for part in network.parameters()} == {dtype}
        before = {name: value.clone() for name, value in network.state_dict().items()}
        BaseStorage("nf4").store(network)
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_weights_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer's codes are made, the weights of those before it are gone."""
    network, seen = tiny_text_denoiser("sd"), list[weakref.ref[Tensor]]()

    def watched(weight: Tensor, kind: Any) -> tuple[Tensor, Tensor]:
        assert not any(
            earlier() is not None for earlier in seen[:-1]
        )  # the last one's loop variable may still be bound
        seen.append(weakref.ref(weight))
        return quantise(weight, kind)

    monkeypatch.setattr(frozen_layers, "quantise", watched)
    BaseStorage("int8").store(network)
    assert len(seen) > 30


def test_a_network_of_other_layers_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"memory\.base='int8' is for linear layers and 2-d convolutions of torch.*: use bf16"
    ):
        BaseStorage("int8").store(tiny_denoiser())


def test_a_weight_that_is_not_finite_is_refused() -> None:
    network = tiny_text_denoiser("sd")
    network.network.mid_block.resnets[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    told = r"memory\.base='nf4': the teacher's layer network\.mid_block\.resnets\.0\.conv1 contains NaN"
    with pytest.raises(UserError, match=told):
        BaseStorage("nf4").store(network)


# --- x0 and LoRA gradients against the bf16 base

# Largest error of x0 over the levels, least cosine. Random weights in narrow layers are what four bits keep worst.
BOUNDS = {
    "int8": {"sd": (0.005, 0.999), "sdxl": (0.005, 0.999), "sd3": (0.002, 0.999), "z-image": (0.02, 0.999), "flux2-klein": (0.01, 0.999)},
    "nf4": {"sd": (0.03, 0.99), "sdxl": (0.06, 0.94), "sd3": (0.02, 0.98), "z-image": (0.2, 0.94), "flux2-klein": (0.1, 0.985)},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "base"),
    [
        ("sdxl", "int8"),
        ("sdxl", "nf4"),
        *(
            pytest.param(family, base, marks=pytest.mark.long)
            for base in BOUNDS
            for family in BOUNDS[base]
            if family != "sdxl"
        ),
    ],
)
def test_x0_and_gradients_of_tiny_networks(family: str, base: Base, tmp_path: Path) -> None:
    teacher = load_teacher(quantised_base.TINY[family](tmp_path / family), device="cpu")
    error, cosine = BOUNDS[base][family]
    for found in quantised_base.compare(teacher, base):
        assert 0 < found.x0_error < error
        assert found.cosine > cosine


@pytest.mark.slow
@pytest.mark.parametrize(("name", "base"), [("emoji-sd", "int8"), ("emoji-sdxl", "nf4")])
def test_x0_and_gradients_of_trained_teachers(name: str, base: Base) -> None:
    """The figures of docs/memory.md; epsilon's x0 at the last level is its error divided by an alpha of 0.07."""
    found = quantised_base.compare(load_teacher(f"bundled:{name}", device="cpu"), base)
    for row, most in zip(found, (0.05, 0.08, 0.08, 0.15), strict=True):
        assert 0 < row.x0_error < most
        assert row.cosine > 0.99


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_recomputed_activations_give_the_same_gradients(base: Base) -> None:
    found = []
    for recomputed in (False, True):
        network = BaseStorage(base).store(tiny_text_denoiser("sd"))
        shared = SharedBase(network, LoraShape(rank=2))
        role: AdapterRole = shared.add_role("generator")
        for number, part in enumerate(role.parameters()):
            nn.init.normal_(part, std=0.1, generator=torch.Generator().manual_seed(number))
        if recomputed:
            shared.checkpoint_activations()
        noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        role.denoise(
            noisy, some_levels(tiny_text_denoiser("sd"), 700, 100), tiny_condition("sd")
        ).square().sum().backward()
        found.append([part.grad for part in role.parameters()])
    assert sum(gradient is not None and bool(gradient.any()) for gradient in found[0]) > 10
    for kept, again in zip(*found, strict=True):
        assert torch.equal(kept, again)
