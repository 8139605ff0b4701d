"""How a network that is never trained stores its weights: float32, bf16, or the layers of its blocks in 8 or 4 bits.

A quantised layer keeps codes and scales. Forward and backward pass each make the weight from them and forget it, so autograd
holds no weights; gradients go through to the layer's input, which is all that LoRAs around it need.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from fewstep.devices import DTYPES
from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.networks.quantised import Kind, dequantise, quantise

Base = Literal["fp32", "bf16", "int8", "nf4"]
_SMALLEST_SHARE = 0.5  # of the parameters of a network's blocks that are in layers which can be quantised


@dataclass(frozen=True)
class BaseStorage:
    """How a frozen network is stored.

    Attributes:
        base: fp32 and bf16 are the type of every weight. int8 is for linear layers and 2-d convolutions of the network's blocks; nf4
            for these linear layers, beside convolutions in int8. The rest is bf16 where the network computes in it, else float32.
    """

    base: Base = "fp32"

    def store(self, network: Denoiser) -> Denoiser:
        """Change a network in place, layer by layer; once more changes nothing. Returns it.

        Raises:
            UserError: most of the network lies elsewhere than in layers that can be quantised, or a weight is not finite.
        """
        if self.base == "fp32" or self.base == "bf16":
            return network.to(DTYPES[self.base])
        if not any(isinstance(layer, FrozenLayer) for layer in network.modules()):
            _quantise(network, self.base)
        return network.to(torch.bfloat16 if network.compute_dtype == torch.bfloat16 else torch.float32)


def _quantise(network: Denoiser, base: Kind) -> None:
    found = _layers(network)
    whole = sum(part.numel() for block in network.blocks() for part in block.parameters())
    share = sum(layer.weight.numel() for layer in found.values()) / whole
    if share < _SMALLEST_SHARE:
        raise UserError(
            f"memory.base={base!r} is for linear layers and 2-d convolutions of torch, which make {share:.0%} of this network's blocks: "
            "use bf16 or fp32"
        )
    network.requires_grad_(False)
    for path in list(found):
        layer = found.pop(path)  # so that each weight is freed before the next one's codes are made
        try:  # nf4 in convolutions would turn LoRA gradients by more than a hundredth: docs/memory.md
            frozen = FrozenLinear(layer, base) if isinstance(layer, nn.Linear) else FrozenConv2d(layer, "int8")
        except ValueError as error:
            raise UserError(f"memory.base={base!r}: the teacher's layer {path} {error}") from None
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, frozen)


def _layers(network: Denoiser) -> dict[str, nn.Linear | nn.Conv2d]:
    """What can be quantised in a network's blocks, by path."""
    inside = {id(layer) for block in network.blocks() for layer in block.modules()}
    return {
        path: layer
        for path, layer in network.named_modules()
        if id(layer) in inside
        and (type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.padding_mode == "zeros"))
    }


class FrozenLayer(nn.Module):
    """What quantised layers share: codes and scales instead of a weight; what else describes the layer stays.

    Args:
        layer: with its weight; not changed.
        kind: int8 or nf4.

    Raises:
        ValueError: the weight is not finite.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, kind: Kind) -> None:
        nn.Module.__init__(self)
        codes, scale = quantise(layer.weight, kind)
        if not scale.is_meta and not bool(scale.isfinite().all()):
            raise ValueError("contains NaN or infinite weights")
        self.kind, self.shape = kind, layer.weight.shape
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        """The weight in the scale's type, made anew."""
        return self.weight_in(self.scale.dtype)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight in a floating-point type, made anew."""
        return dequantise(self.codes, self.scale, self.kind, self.shape, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer it was, in autocast's type where that is on."""
        dtype = x.dtype
        place = "cpu" if x.is_meta else x.device.type
        if torch.is_autocast_enabled(place) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(place)
        made: Tensor = _Product.apply(x.to(dtype), self)
        return made

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's output, its bias included."""
        raise NotImplementedError("a FrozenLayer subclass knows its product")

    def input_gradient(self, gradient: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:
        """The gradient at x, of the output's."""
        raise NotImplementedError("a FrozenLayer subclass knows its gradient")

    def _bias_in(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)


class FrozenLinear(FrozenLayer, nn.Linear):  # type: ignore[override, misc]
    """A linear layer with a quantised weight."""

    def __init__(self, layer: nn.Linear, kind: Kind) -> None:
        super().__init__(layer, kind)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self._bias_in(x.dtype))

    def input_gradient(self, gradient: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:
        return gradient @ weight


class FrozenConv2d(FrozenLayer, nn.Conv2d):  # type: ignore[override]
    """A 2-d convolution, padded with zeros, with a quantised weight."""

    def __init__(self, layer: nn.Conv2d, kind: Kind) -> None:
        super().__init__(layer, kind)
        self.in_channels, self.out_channels, self.kernel_size = layer.in_channels, layer.out_channels, layer.kernel_size
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.groups, self.padding_mode, self.output_padding = layer.groups, layer.padding_mode, layer.output_padding

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self._bias_in(x.dtype), self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, gradient: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:
        options: Any = (self.stride, self.padding, self.dilation, self.groups)
        return conv2d_input(x_shape, weight, gradient, *options)


class _Product(torch.autograd.Function):
    """A frozen layer's output; only x gets a gradient, and only codes are kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLayer) -> Tensor:
        ctx.layer, ctx.x_shape = layer, x.shape
        return layer.product(x, layer.weight_in(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layer: FrozenLayer = ctx.layer
        return layer.input_gradient(gradient, layer.weight_in(gradient.dtype), ctx.x_shape), None
