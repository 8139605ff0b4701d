"""Counts live tensor bytes of code that runs on fake tensors: the real code, its autograd, its optimisers, no memory."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.estimate.fake_calls import FakeCalls

ACTIVATIONS = "activations"


class MemoryMeter(TorchDispatchMode):
    """Live and peak bytes of the storages that operations make inside it, by kind.

    A storage counts once, whatever views it has, from the operation that makes it until it is freed. What kernels
    allocate and free inside one operation is not seen.

    Attributes:
        live: bytes by kind; everything is an activation until `assign` says otherwise.
        peak: the largest total since `start_phase`, in bytes.
        at_peak: `live` at that moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.total = self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self.storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self.kinds: dict[int, str] = {}
        self._calls = FakeCalls()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps each call in what keeps its compiler away, and nothing is compiled here

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # most calls are this one; the fake mode's own answer takes ten times as long
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # a fake tensor has no value: the step's one host number is which simulated step to train
        made, tensors = self._calls(func, args, kwargs or {})
        for tensor in tensors:
            self._note(tensor)
        return made

    def assign(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Say what the storages of these tensors are for."""
        for tensor in tensors:
            self._note(tensor)
            key = tensor.untyped_storage()._cdata
            size = self.storages[key][1]
            self.live[self.kinds[key]] -= size
            self.live[kind] += size
            self.kinds[key] = kind

    def start_phase(self) -> None:
        """Forget the peak so far."""
        self.peak, self.at_peak = self.total, self.live.copy()

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return
        self.storages[key] = (weakref.ref(storage, self._forget(key)), size)
        self.kinds[key] = ACTIVATIONS
        self.live[ACTIVATIONS] += size
        self.total += size
        if self.total > self.peak:
            self.start_phase()

    def _forget(self, key: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            size = self.storages.pop(key)[1]
            self.live[self.kinds.pop(key)] -= size
            self.total -= size

        return forget


def _in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A normalisation as CUDA's autocast runs it: in float32; the CPU's runs it in bf16, at other sizes."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return norm(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return norm(*map(_float, args), **{name: _float(value) for name, value in kwargs.items()})

    return run


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def _apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What `to`, `float` and `to_empty` do: torch's own swaps every fake parameter, and cannot where it is referenced.

    A parameter that stays as it is stays the same object, as outside: adapters share theirs.
    """
    for child in module.children() if recurse else ():
        _apply(child, convert)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            made = convert(parameter)
        if made is not parameter:
            module._parameters[name] = nn.Parameter(made, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else convert(buffer)
    return module


def to_fake(module: nn.Module) -> nn.Module:
    """A module of the meta device, in place, with fake tensors; inside a `FakeMachine`. `to_empty` is slower there."""
    return _apply(module, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))


def _deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """A copy of a fake tensor; torch's own asks for its data."""
    if id(tensor) not in memo:
        made = tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    return memo[id(tensor)]


class FakeMachine:
    """Where tensors have shapes, types and gradients but no bytes; what they would take is metered.

    Args:
        gpu: follow CUDA's autocast instead of the CPU's.
    """

    def __init__(self, gpu: bool) -> None:
        self.meter, self.gpu = MemoryMeter(), gpu
        self._stack = ExitStack()

    def __enter__(self) -> MemoryMeter:
        self._stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        self._stack.enter_context(mock.patch.object(FakeTensor, "__deepcopy__", _deepcopy, create=True))
        self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        self._stack.enter_context(self.meter)
        if self.gpu:
            for name in ("group_norm", "layer_norm"):
                self._stack.enter_context(mock.patch.object(F, name, _in_float32(getattr(F, name))))
        return self.meter

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
