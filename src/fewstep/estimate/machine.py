"""A machine without memory: code runs on the meta device, and the bytes its tensors would take are metered.

Two of torch's own extension points do it, and nothing is patched. A `TorchFunctionMode` sees what Python calls: it
makes and keeps all tensors on the meta device and does what autocast would do there (autocast itself knows no meta
tensors). A `TorchDispatchMode` (meter.py) sees each operation, the backward pass's included, and counts the storages
that it makes.

Why not torch's own memory tracker: memory.py.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from fewstep.estimate.calls import META, Calls
from fewstep.estimate.meter import Meter

_CPU = torch.device("cpu")
_aten = torch.ops.aten

# What autocast runs in half precision, and what a GPU's runs in float32: the operations that networks are made of.
# Source: "CUDA Op-Specific Behavior" and "CPU Op-Specific Behavior" in torch's documentation of automatic mixed precision.
_HALF = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, torch.conv2d, torch.matmul, torch.mm, torch.bmm,
    torch.addmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.baddbmm,
    F.scaled_dot_product_attention,
}  # fmt: skip
_FLOAT = {
    F.group_norm, F.layer_norm, F.rms_norm, F.softmax, torch.softmax, Tensor.softmax, torch.norm, Tensor.norm, torch.pow,
    Tensor.pow, torch.exp, Tensor.exp, torch.log, Tensor.log, torch.sum, Tensor.sum, F.mse_loss, F.softplus, torch.rsqrt,
    Tensor.rsqrt, torch.cumsum, Tensor.cumsum,
}  # fmt: skip
_MOVES = {Tensor.backward, torch.autograd.grad, Tensor.to, Tensor.cpu, Tensor.cuda}


class MetaMachine(TorchFunctionMode):
    """What Python code calls inside runs on the meta device, whatever device it names.

    Args:
        gpu: follow CUDA's autocast instead of the CPU's.
    """

    def __init__(self, gpu: bool, calls: Calls | None = None) -> None:
        super().__init__()
        self.gpu, self.meter = gpu, Meter(calls)
        self._optimizing = False
        # with what makes tensors on a default device: a `torch.device` around everything would meet each call again
        self._handled = _HALF | _FLOAT | _MOVES | _device_constructors()

    def optimizing(self, value: bool) -> Callable[..., None]:
        """A hook for the begin, or the end, of optimiser steps."""

        def hook(*_: Any) -> None:
            self._optimizing = value

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._optimizing and func == _DEVICE:
            return _CPU  # fused optimisers refuse any other without their kernel
        if func in self._handled:
            return self._handle(func, args, kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = META
        return func(*args, **kwargs)

    def _handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is not simply run: the backward pass, what autocast knows, and what names a device or takes the default one."""
        if func is Tensor.backward:
            return self._backward(*args, **kwargs)
        if func is torch.autograd.grad:
            return self._grad(*args, **kwargs)
        if func in _HALF or func in _FLOAT:
            return self._run(func, args, kwargs)
        if func in (Tensor.cpu, Tensor.cuda):
            return args[0]
        if func is Tensor.to:
            args = (args[0], *(META if isinstance(value, torch.device | str) else value for value in args[1:]))
        if func is not Tensor.to or kwargs.get("device") is not None:
            kwargs["device"] = META
        return func(*args, **kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation that autocast may run in another precision; attention by the kernel that keeps no scores."""
        if torch.is_autocast_enabled("cpu"):
            if func in _HALF:
                convert = self._half
            elif self.gpu:
                convert = _float
            else:
                convert = _same
            args, kwargs = tuple(map(convert, args)), {name: convert(value) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _half(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        dtype = torch.get_autocast_dtype("cpu")
        if not (value.requires_grad and value.is_leaf):
            return value.to(dtype)
        if id(value) not in self.meter.casts:
            self.meter.casts[id(value)] = value.to(dtype)
        return self.meter.casts[id(value)]

    def _backward(
        self, tensor: Tensor, gradient: Tensor | None = None, retain_graph: bool | None = None,
        create_graph: bool = False, inputs: Any = None,
    ) -> None:  # fmt: skip
        """`Tensor.backward`."""
        self._run_engine((tensor,), (gradient,), retain_graph, create_graph, tuple(inputs or ()), accumulate_grad=True)

    def _grad(
        self, outputs: Any, inputs: Any, grad_outputs: Any = None, retain_graph: bool | None = None,
        create_graph: bool = False, **_: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """`torch.autograd.grad`."""
        outputs, inputs = _tuple(outputs), _tuple(inputs)
        gradients = (None,) * len(outputs) if grad_outputs is None else _tuple(grad_outputs)
        return self._run_engine(outputs, gradients, retain_graph, create_graph, inputs, accumulate_grad=False)

    def _run_engine(
        self, outputs: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...], retain_graph: bool | None,
        create_graph: bool, inputs: tuple[Tensor, ...], accumulate_grad: bool,
    ) -> Any:  # fmt: skip
        """The backward pass, in which recomputed activations call Python: torch's own functions would hide them from us."""
        whole = tuple(
            torch.ones_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(outputs, gradients, strict=True)
        )
        keep = create_graph if retain_graph is None else retain_graph
        with self:
            return _engine_run_backward(
                outputs, whole, keep, create_graph, inputs, allow_unreachable=True, accumulate_grad=accumulate_grad
            )


def _tuple(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


_DEVICE = Tensor.device.__get__


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _same(value: Any) -> Any:
    return value


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    made: Tensor = _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return made


@contextmanager
def meta_machine(gpu: bool, calls: Calls | None = None) -> Iterator[Meter]:
    """Inside, networks are built, run and trained without memory; the meter says what they would take.

    Python's cycle collector rests: it walks all modules again and again, a third of the time, and no tensor of a step waits for it.
    """
    machine, collected = MetaMachine(gpu, calls), gc.isenabled()
    hooks = [
        register_optimizer_step_pre_hook(machine.optimizing(True)),
        register_optimizer_step_post_hook(machine.optimizing(False)),
    ]
    gc.disable()
    try:
        with machine.meter, machine:
            yield machine.meter
    finally:
        if collected:
            gc.enable()
        for hook in hooks:
            hook.remove()
