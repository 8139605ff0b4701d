"""Layers that several roles share: a frozen linear or convolution, and beside it a low-rank update for each role.

    y = W x + (alpha / rank) B A x, while it trains with dropout B A dropout(x)

The layers are called thousands of times a step, so a forward does nothing else: the product with B adds itself to
`W x` (one kernel), and the factors come in the precision of the forward, all of a role in one cast.

Names are those of peft's layers (`base_layer`, `lora_A.<role>`, `lora_B.<role>`), and so are the starting values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.errors import UserError


@dataclass
class Binding:
    """What all layers of one base look up in a forward.

    Attributes:
        role: whose update takes part now; None: nobody's, the layers are their base.
        factors: of that role in the precision of the forward, A and B of layer n at 2 n and 2 n + 1; empty: the
            parameters themselves.
        dropout: share of an update's inputs that a forward leaves out which gradients go through.
    """

    role: str | None = None
    factors: tuple[Tensor, ...] = ()
    dropout: float = 0.0


class LoraLayer(nn.Module):
    """A frozen linear or 2-d convolution with one low-rank update for each role.

    Args:
        base_layer: nn.Linear or nn.Conv2d.
        binding: shared by all layers of a base.
        number: of this layer among them.
        scale: alpha / rank.
    """

    def __init__(self, base_layer: nn.Linear | nn.Conv2d, binding: Binding, number: int, scale: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.binding, self.number, self.scale = binding, number, scale

    def add_role(self, role: str, rank: int, device: torch.device) -> None:
        """A new update, float32, that starts as no change at all: A random, B zero."""
        base = self.base_layer
        down: nn.Module
        up: nn.Module
        if isinstance(base, nn.Linear):
            down, up = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        else:
            down = nn.Conv2d(
                base.in_channels, rank, base.kernel_size, base.stride, base.padding, base.dilation, bias=False  # type: ignore[arg-type]
            )  # fmt: skip
            up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        self.lora_A[role], self.lora_B[role] = (part.float().to(device) for part in (down, up))

    @property
    def weight(self) -> Tensor:
        """Of the base: networks ask their layers for its type or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """Of the base."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., in) -> (B, ..., out), of a convolution (B, in, H, W) -> (B, out, H', W')."""
        binding = self.binding
        if binding.role is None:
            return self.base_layer(x)
        if binding.factors:
            down, up = binding.factors[2 * self.number], binding.factors[2 * self.number + 1]
            x = x.to(down.dtype)  # once, for base and update
        else:
            down, up = self.parameters_of(binding.role)
        base: Any = self.base_layer
        y = base(x)  # on x as it came: rows put together first would round float32 runs otherwise than before
        if binding.dropout and torch.is_grad_enabled():
            x = F.dropout(x, binding.dropout)
        if isinstance(base, nn.Linear):
            inner = F.linear(x, down).flatten(0, -2)
            return torch.addmm(y.reshape(-1, y.shape[-1]), inner, up.t(), alpha=self.scale).view(y.shape)
        inner = F.conv2d(x, down, None, base.stride, base.padding, base.dilation)
        return torch.add(y, F.conv2d(inner, up), alpha=self.scale)

    def delta_weight(self, role: str) -> Tensor:
        """What a role adds to the base's weight, of its shape: (alpha / rank) B A."""
        down, up = self.parameters_of(role)
        return low_rank_update(down, up, self.scale).view(self.weight.shape)

    def parameters_of(self, role: str) -> tuple[Tensor, Tensor]:
        """A and B of a role."""
        down: Any = self.lora_A[role]
        up: Any = self.lora_B[role]
        return down.weight, up.weight


def low_rank_update(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """scale B A, (out, in x kernel)."""
    return (up.flatten(1) @ down.flatten(1)) * scale


def wrap_layers(network: nn.Module, targets: Sequence[str], binding: Binding, scale: float) -> dict[str, LoraLayer]:
    """Put a `LoraLayer` around every layer whose path ends in one of `targets`; returns them by path.

    Raises:
        UserError: a target names something else than linear layers and plain convolutions.
    """
    chosen = {
        name: module
        for name, module in network.named_modules()
        if any(f".{name}".endswith(f".{target}") for target in targets)
    }
    for name, module in chosen.items():
        if not isinstance(module, nn.Linear | nn.Conv2d) or getattr(module, "groups", 1) != 1:
            raise UserError(
                f"memory.lora_targets: {name} is a {type(module).__name__}; a LoRA goes on linear layers and on 2-d "
                "convolutions without groups"
            )
    layers: dict[str, LoraLayer] = {}
    for number, (name, module) in enumerate(chosen.items()):
        assert isinstance(module, nn.Linear | nn.Conv2d)
        layers[name] = LoraLayer(module, binding, number, scale)
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, layers[name])
    return layers


def cast_factors(factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """All factors in another precision by one operation; their gradients come back by one."""
    made: tuple[Tensor, ...] = _Cast.apply(dtype, *factors)
    return made


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # the layers of a decoder that was not run get none
        ctx.dtype = factors[0].dtype
        return tuple(_copies(factors, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [number for number, gradient in enumerate(gradients) if gradient is not None]
        found: list[Tensor | None] = [None] * len(gradients)
        copies = _copies([gradients[number] for number in given], ctx.dtype)  # type: ignore[misc]
        for number, gradient in zip(given, copies, strict=True):
            found[number] = gradient
        return None, *found


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    if not tensors:
        return []
    made = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(made, list(tensors))
    return made
