"""A machine without memory: code runs on the meta device, and the bytes its tensors would take are metered.

Two of torch's own extension points do it, and nothing is patched. A `TorchFunctionMode` sees what Python calls: it
says that tensors lie on the CPU, makes all new ones on the meta device and does what autocast would do there (autocast
itself knows no meta tensors). A `TorchDispatchMode` sees each operation, the backward pass's included, and counts the
storages that it makes.

Why not torch's own memory tracker: memory.py.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fewstep.estimate.calls import META, Calls, is_meta

ACTIVATIONS = "activations"
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
    F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, torch.norm, Tensor.norm, torch.pow, Tensor.pow,
    torch.exp, Tensor.exp, torch.log, Tensor.log, torch.sum, Tensor.sum, F.mse_loss, F.softplus, torch.rsqrt,
    Tensor.rsqrt, torch.cumsum, Tensor.cumsum,
}  # fmt: skip


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


_FLOPS: dict[Any, Callable[..., int]] = flop_registry | {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class Meter(TorchDispatchMode):
    """Live and peak bytes of the storages that operations make inside it, by kind, and the operations' arithmetic.

    A storage counts once, whatever views it has, from the operation that makes it until it is freed. What kernels
    allocate and free inside one operation is not seen.

    Attributes:
        live: bytes by kind; everything is an activation until `assign` says otherwise.
        total: bytes of all kinds.
        peak: the largest total since `start_phase`, in bytes.
        at_peak: `live` at that moment.
        flops: floating-point operations of matrix products, convolutions and attention.
    """

    def __init__(self, calls: Calls | None = None) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.total = self.peak = self.flops = 0
        self.at_peak: Counter[str] = Counter()
        self._storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._kinds: dict[int, str] = {}
        self._calls = Calls() if calls is None else calls
        self.casts: dict[int, Tensor] = {}  # autocast's copies of weights, until it ends

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps each call in what keeps its compiler away, and nothing is compiled here

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.casts and not torch.is_autocast_enabled("cpu"):
            self.casts.clear()
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default and is_meta(args[0]):
            return 0  # no tensor has a value: the step's one host number is which simulated step to train
        made = self._calls(func, args, kwargs)
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=made)
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return made

    def assign(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Say what the storages of these tensors are for."""
        for tensor in tensors:
            self._note(tensor)
            key = id(tensor.untyped_storage())
            if key not in self._storages:
                continue  # a real number
            size = self._storages[key][1]
            self.live[self._kinds[key]] -= size
            self.live[kind] += size
            self._kinds[key] = kind

    def start_phase(self) -> None:
        """Forget the peak and the arithmetic so far."""
        self._mark()
        self.flops = 0

    def _mark(self) -> None:
        self.peak, self.at_peak = self.total, self.live.copy()

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._storages or storage.device != META:
            return
        size = storage.nbytes()
        self._storages[key] = (weakref.ref(storage, self._forget(key)), size)
        self._kinds[key] = ACTIVATIONS
        self.live[ACTIVATIONS] += size
        self.total += size
        if self.total > self.peak:
            self._mark()

    def _forget(self, key: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            size = self._storages.pop(key)[1]
            self.live[self._kinds.pop(key)] -= size
            self.total -= size

        return forget


class MetaMachine(TorchFunctionMode):
    """What Python code calls inside runs on the meta device, and is told that this is the CPU.

    Args:
        gpu: follow CUDA's autocast instead of the CPU's.
    """

    def __init__(self, gpu: bool, calls: Calls | None = None) -> None:
        super().__init__()
        self.gpu, self.meter = gpu, Meter(calls)
        self._optimizing = False

    def optimizing(self, value: bool) -> Callable[..., None]:
        """A hook for the begin, or the end, of optimiser steps."""

        def hook(*_: Any) -> None:
            self._optimizing = value

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == _DEVICE and self._optimizing:
            return _CPU  # fused optimisers refuse any other without their kernel
        if func is Tensor.backward:
            return self._backward(*args, **kwargs)
        if func is torch.autograd.grad:
            return self._grad(*args, **kwargs)
        if func in _HALF or func in _FLOAT:
            return self._run(func, args, kwargs)
        if "device" in kwargs and kwargs["device"] is not None:
            kwargs["device"] = META
        if func is Tensor.to or func in (Tensor.cpu, Tensor.cuda):
            args = (args[0], *(META if isinstance(value, torch.device | str) else value for value in args[1:]))
            if func is not Tensor.to:
                return args[0]
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
    """Inside, networks are built, run and trained without memory; the meter says what they would take."""
    machine = MetaMachine(gpu, calls)
    hooks = [
        register_optimizer_step_pre_hook(machine.optimizing(True)),
        register_optimizer_step_post_hook(machine.optimizing(False)),
    ]
    try:
        with torch.device("meta"), machine.meter, machine:
            yield machine.meter
    finally:
        for hook in hooks:
            hook.remove()
