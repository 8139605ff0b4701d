"""How a network that is never trained stores its weights: float32, bf16, or the layers of its blocks in 8 or 4 bits.

A quantised layer keeps codes and scales. Forward and backward pass each make the weight from them and forget it, so autograd
holds no weights; gradients go through to the layer's input, which is all that LoRAs around it need.

Layers may lie in host memory. A forward copies what it needs to its input's device; where activations are recomputed, autograd
holds the copy from a block's recomputation to the end of its backward pass, and nothing otherwise.
"""

from collections import Counter
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
from fewstep.networks.quantised import dequantise, quantise

Base = Literal["fp32", "bf16", "int8", "nf4"]
_SMALLEST_SHARE = 0.5  # of the parameters of a network's blocks that are in layers which can be quantised


@dataclass(frozen=True)
class BaseStorage:
    """How a frozen network is stored.

    Attributes:
        base: fp32 and bf16 are the type of every weight. int8 is for linear layers and 2-d convolutions of the network's blocks; nf4
            for these linear layers, beside convolutions in int8. The rest is bf16 where the network computes in it, else float32.
        on_host: linear layers and 2-d convolutions of the blocks lie in host memory.
    """

    base: Base = "fp32"
    on_host: bool = False

    def store(self, network: Denoiser) -> Denoiser:
        """Change a network in place, layer by layer; once more changes nothing. Returns it.

        Raises:
            UserError: most of the network lies elsewhere than in layers that can be stored so, or a weight is not finite.
        """
        plain = self.base == "fp32" or self.base == "bf16"
        if (self.on_host or not plain) and not any(isinstance(layer, FrozenLayer) for layer in network.modules()):
            self._replace(network)
        half = network.compute_dtype == torch.bfloat16
        return network.to(DTYPES[self.base] if plain else torch.bfloat16 if half else torch.float32)

    def _replace(self, network: Denoiser) -> None:
        found = _layers(network)
        whole = sum(part.numel() for block in network.blocks() for part in block.parameters())
        share = sum(layer.weight.numel() for layer in found.values()) / whole
        setting = "memory.teacher='offloaded_blocks'" if self.on_host else f"memory.base={self.base!r}"
        if share < _SMALLEST_SHARE:
            raise UserError(
                f"{setting} is for linear layers and 2-d convolutions of torch, which make {share:.0%} of this network's blocks: "
                + ("leave it out" if self.on_host else "use bf16 or fp32")
            )
        network.requires_grad_(False)
        for path in list(found):
            layer = found.pop(path)  # so that each weight is freed before the next one's codes are made
            # four bits in convolutions cost LoRA gradients most: docs/memory.md
            base = "int8" if self.base == "nf4" and isinstance(layer, nn.Conv2d) else self.base
            try:
                frozen = FrozenLinear(layer, base) if isinstance(layer, nn.Linear) else FrozenConv2d(layer, base)
            except ValueError as error:
                raise UserError(f"{setting}: the teacher's layer {path} {error}") from None
            if self.on_host:
                frozen.keep_on_host()
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, frozen)


def store_linears(module: nn.Module, base: Base) -> None:
    """Keep the linear layers of a frozen module, such as a text encoder, in 8 or 4 bits; once more changes nothing.

    The rest stays in its type, and so does what is computed: embeddings, norms and layers that give their weight to others.

    Raises:
        UserError: a weight is not finite.
    """
    module.requires_grad_(False)
    shared = _shared_weights(module)
    for path, layer in list(module.named_modules()):
        if type(layer) is not nn.Linear or id(layer.weight) in shared:
            continue
        try:
            frozen = FrozenLinear(layer, base)
        except ValueError as error:
            raise UserError(f"memory.base={base!r}: the text encoder's layer {path} {error}") from None
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, frozen)


def _shared_weights(module: nn.Module) -> set[int]:
    """Weights that two layers have, such as an embedding's that is the last projection's too."""
    seen = Counter(id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear | nn.Embedding))
    return {weight for weight, times in seen.items() if times > 1}


def _layers(network: Denoiser) -> dict[str, nn.Linear | nn.Conv2d]:
    """What can be stored so in a network's blocks, by path."""
    inside = {id(layer) for block in network.blocks() for layer in block.modules()}
    return {
        path: layer
        for path, layer in network.named_modules()
        if id(layer) in inside
        and (type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.padding_mode == "zeros"))
    }


def host_tensors(network: nn.Module) -> list[Tensor]:
    """What of a network lies in host memory."""
    return [part for layer in network.modules() if isinstance(layer, FrozenLayer) for part in layer.on_host]


class FrozenLayer(nn.Module):
    """What frozen layers share: codes and scales instead of a weight; what else describes the layer stays.

    Attributes:
        on_host: codes and scale where they lie in host memory; no move of the network takes them with it. Else empty.

    Args:
        layer: with its weight; not changed.
        base: how the weight is stored; fp32 and bf16 are codes without a scale.

    Raises:
        ValueError: the weight is not finite.
    """

    codes: Tensor
    scale: Tensor | None
    on_host: tuple[Tensor, ...]

    def __init__(self, layer: nn.Linear | nn.Conv2d, base: Base) -> None:
        nn.Module.__init__(self)
        self.base, self.shape, self.on_host = base, layer.weight.shape, ()
        scale: Tensor | None = None
        if base == "int8" or base == "nf4":
            codes, scale = quantise(layer.weight, base)
            if not scale.is_meta and not bool(scale.isfinite().all()):
                raise ValueError("contains NaN or infinite weights")
        else:
            codes = layer.weight.detach().to(DTYPES[base])
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def keep_on_host(self) -> None:
        """Codes and scale lie in host memory from now on, pinned where there is a CUDA device."""
        parts = [part if part.is_meta else part.cpu() for part in (self.codes, self.scale) if part is not None]
        self.on_host = tuple(part.pin_memory() if torch.cuda.is_available() else part for part in parts)
        self.register_buffer("codes", None)
        self.register_buffer("scale", None)

    @property
    def weight(self) -> Tensor:
        """The weight, made anew where it lies, in bf16 where it was quantised and computed with in it."""
        codes, scale = self._stored()
        return self.weight_of(codes, scale, codes.dtype if scale is None else scale.dtype)

    def weight_of(self, codes: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The weight in a floating-point type, of this layer's codes and scale wherever they are."""
        if self.base == "int8" or self.base == "nf4":
            assert scale is not None
            return dequantise(codes, scale, self.base, self.shape, dtype)
        return codes.to(dtype)

    def _stored(self, device: torch.device | None = None) -> tuple[Tensor, Tensor | None]:
        """Codes and scale; of a layer in host memory new copies on the device."""
        if not self.on_host:
            return self.codes, self.scale
        parts = self.on_host
        if device is not None:
            parts = tuple(part.to(device, non_blocking=True, copy=True) for part in parts)
        return parts[0], parts[1] if len(parts) > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """As the layer it was, in autocast's type where that is on."""
        dtype = x.dtype
        place = "cpu" if x.is_meta else x.device.type
        if torch.is_autocast_enabled(place) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(place)
        made: Tensor = _Product.apply(x.to(dtype), *self._stored(x.device), self)
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
    """A linear layer with a frozen weight."""

    def __init__(self, layer: nn.Linear, base: Base) -> None:
        super().__init__(layer, base)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self._bias_in(x.dtype))

    def input_gradient(self, gradient: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:
        return gradient @ weight


class FrozenConv2d(FrozenLayer, nn.Conv2d):  # type: ignore[override]
    """A 2-d convolution, padded with zeros, with a frozen weight."""

    def __init__(self, layer: nn.Conv2d, base: Base) -> None:
        super().__init__(layer, base)
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
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor | None, layer: FrozenLayer) -> Tensor:
        ctx.layer, ctx.x_shape = layer, x.shape
        ctx.save_for_backward(codes, scale)
        return layer.product(x, layer.weight_of(codes, scale, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        layer: FrozenLayer = ctx.layer
        codes, scale = ctx.saved_tensors
        return (
            layer.input_gradient(gradient, layer.weight_of(codes, scale, gradient.dtype), ctx.x_shape),
            None,
            None,
            None,
        )
