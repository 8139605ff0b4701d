"""Quantised layers are the layers of their weights, keep nothing but codes, and carry LoRAs as plain ones do."""

import re
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.diffusion.denoiser import Denoiser, computing_in
from fewstep.errors import UserError
from fewstep.models.load import load_teacher
from fewstep.networks import frozen_layers
from fewstep.networks.adapters import AdapterRole, LoraShape, SharedBase
from fewstep.networks.frozen_layers import (
    Base,
    BaseStorage,
    FrozenConv2d,
    FrozenLayer,
    FrozenLinear,
    host_tensors,
    store_linears,
)
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


def frozen(layer: Any, base: Base) -> FrozenLayer:
    return FrozenLinear(layer, base) if isinstance(layer, nn.Linear) else FrozenConv2d(layer, base)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_a_layer_is_the_layer_of_its_weight(make: Any, shape: tuple[int, ...], kind: Any) -> None:
    """Output and gradient at its input, in float64."""
    torch.manual_seed(0)
    plain = make().double().requires_grad_(False)
    small = frozen(plain, kind)
    plain.weight.copy_(small.weight_of(small.codes, small.scale, torch.float64))
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
        kinds = {(type(layer), layer.base) for layer in inside if isinstance(layer, FrozenLayer)}
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


def test_networks_call_their_layers_and_never_ask_for_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would be made anew each time."""

    def asked(self: Any) -> Tensor:
        raise AssertionError("a weight was asked for")

    for family in ("sd", "sdxl", "sd3"):
        network = BaseStorage("int8").store(tiny_text_denoiser(family))
        shared = SharedBase(network, LoraShape(rank=2))
        role = shared.add_role("generator")
        with monkeypatch.context() as patch:
            patch.setattr(FrozenLayer, "weight", property(asked))
            role.denoise(torch.randn(2, *network.image_shape), some_levels(network, 700, 100), tiny_condition(family))


# --- In host memory


def pointer_of(tensor: Tensor) -> int:
    """A storage's own number while it is there."""
    return tensor.untyped_storage().data_ptr()


class Moves(TorchDispatchMode):
    """Sees copies of host tensors, the CPU standing in for a GPU: how often each was made, and which are alive when one is made."""

    def __init__(self, network: Denoiser) -> None:
        super().__init__()
        self.blocks = {
            pointer_of(part): number for number, block in enumerate(network.blocks()) for part in host_tensors(block)
        }
        self.counts, self.copies = Counter[int](), list[tuple[int, weakref.ref[Any]]]()
        self.most_alive, self.blocks_alive = 0, set[int]()

    def alive(self) -> list[int]:
        """The block of each copy that is alive."""
        return [block for block, copy in self.copies if copy() is not None]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            source = pointer_of(args[0])
            if source in self.blocks:
                self.counts[source] += 1
                self.copies.append((self.blocks[source], weakref.ref(made.untyped_storage())))
                alive = self.alive()
                self.most_alive = max(self.most_alive, len(alive))
                self.blocks_alive.add(len(set(alive)))
        return made


@pytest.mark.parametrize(("family", "base"), [("sd3", "nf4"), ("sdxl", "bf16")])
def test_a_block_is_on_the_device_only_around_its_use(family: str, base: Base) -> None:
    """Same x0 and gradients as at home; a layer at a time without gradients, a block at a time with; nothing afterwards.

    Of a U-Net, what diffusers does not recompute (projections around transformers, resampling, the middle's first layers) stays from
    the forward on.
    """
    found = []
    for on_host in (False, True):
        network = tiny_text_denoiser(family)
        network.compute_dtype = torch.bfloat16
        BaseStorage(base, on_host).store(network)
        shared = SharedBase(network, LoraShape(rank=2))
        shared.checkpoint_activations()
        role = shared.add_role("generator")
        for number, part in enumerate(role.parameters()):
            nn.init.normal_(part, std=0.1, generator=torch.Generator().manual_seed(number))
        noisy = torch.randn(2, *network.image_shape, generator=torch.Generator().manual_seed(0))
        level, condition = some_levels(network, 700, 100), tiny_condition(family)
        with Moves(network) as free, torch.no_grad():
            bare = network.denoise(noisy, level, condition)
        with Moves(network) as trained:
            role.denoise(noisy, level, condition).square().sum().backward()
        found.append([bare, *(part.grad for part in role.parameters())])
        assert not free.alive()
        assert not trained.alive()
    assert all(torch.equal(here, there) for here, there in zip(*found, strict=True))
    each = 1 if base == "bf16" else 2  # codes and scale
    assert (free.most_alive, set(free.counts.values())) == (each, {1})
    assert trained.most_alive > each
    if family == "sd3":
        assert trained.blocks_alive == {1}
        assert set(trained.counts.values()) == {2}  # forward and recomputation, which the backward pass uses too
    else:
        once = {pointer for pointer, count in trained.counts.items() if count == 1}
        layers = {path: layer for path, layer in network.named_modules() if isinstance(layer, FrozenLayer)}
        found_once = {path for path, layer in layers.items() if any(pointer_of(part) in once for part in layer.on_host)}
        assert found_once == {
            path for path in layers if re.search(r"\.(proj_in|proj_out|\w+samplers|mid_block\.resnets\.0)\.", path)
        }
    assert len(trained.counts) == len(host_tensors(network)) > 20
    assert not [name for name in network.state_dict() if name.endswith("codes")]


def test_linears_of_a_text_encoder_are_stored_where_nothing_else_has_their_weight() -> None:
    """A projection that is the embedding's own stays, as it would no longer be; and so does what is no linear layer."""
    encoder = nn.ModuleDict(
        {
            "embed": nn.Embedding(8, 64),
            "norm": nn.LayerNorm(64),
            "one": nn.Linear(64, 64),
            "last": nn.Linear(64, 8, bias=False),
        }
    )
    encoder["last"].weight = encoder["embed"].weight
    expected = encoder["one"].weight.detach()
    for _ in range(2):
        store_linears(encoder, "int8")
    assert [type(layer) for layer in encoder.values()] == [nn.Embedding, nn.LayerNorm, FrozenLinear, nn.Linear]
    assert encoder["last"].weight is encoder["embed"].weight
    assert (encoder["one"].weight.float() - expected).abs().max() < 0.01 * expected.abs().max()
    bad = nn.ModuleDict({"one": nn.Linear(2, 2)})
    nn.init.constant_(bad["one"].weight, float("nan"))
    with pytest.raises(
        UserError, match=r"^memory\.base='nf4': the text encoder's layer one contains NaN or infinite weights$"
    ):
        store_linears(bad, "nf4")
