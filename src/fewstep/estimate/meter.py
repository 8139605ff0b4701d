"""Counts what operations on the meta device keep, and their arithmetic, the backward pass's included."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _len_torch_function_stack, _pop_mode, _push_mode
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.estimate.calls import META, Calls

ACTIVATIONS = "activations"
_NUMBER, _COPY = torch.ops.aten._local_scalar_dense.default, torch.ops.aten._to_copy.default


class Meter(TorchDispatchMode):
    """Live and peak bytes of the storages that operations make inside it, by kind, and the operations' arithmetic.

    A storage counts once, whatever views it has, from the operation that makes it until it is freed. What kernels
    allocate and free inside one operation is not seen.

    Attributes:
        live: bytes by kind; everything is an activation until `assign` says otherwise.
        total: bytes of all kinds.
        peak: the largest total since `start_phase`, in bytes.
        moved: bytes copied from what lies in host memory.
    """

    def __init__(self, calls: Calls | None = None) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.total = self.peak = self.moved = 0
        self._host: dict[int, torch.UntypedStorage] = {}
        self._at_peak: Counter[str] = Counter()
        self._rising = True  # the total is its peak, and `_at_peak` is yet to be taken
        self._storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._kinds: dict[int, str] = {}
        self._calls = Calls() if calls is None else calls
        self._flops_before = self._calls.flops
        self.casts: dict[int, Tensor] = {}  # autocast's copies of weights, until it ends

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps each call in what keeps its compiler away, and nothing is compiled here

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not _len_torch_function_stack():
            return self._run(func, args, kwargs or {})
        machine = _pop_mode()  # else it would meet every look at a tensor in here
        try:
            return self._run(func, args, kwargs or {})
        finally:
            _push_mode(machine)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.casts and not torch.is_autocast_enabled("cpu"):
            self.casts.clear()
        if func is _NUMBER and args[0].is_meta:
            return 0  # no tensor has a value: the step's one host number is which simulated step to train
        if func is _COPY and self._host and id(args[0].untyped_storage()) in self._host:
            self.moved += args[0].nbytes
        made = self._calls(func, args, kwargs)
        if isinstance(made, Tensor):
            self._note(made)
        elif isinstance(made, tuple | list):
            for part in made:
                if isinstance(part, Tensor):
                    self._note(part)
        return made

    def assign(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Say what the storages of these tensors are for."""
        self._keep_peak()
        for tensor in tensors:
            self._note(tensor)
            key = id(tensor.untyped_storage())
            if key not in self._storages:
                continue  # a real number
            size = self._storages[key][1]
            self.live[self._kinds[key]] -= size
            self.live[kind] += size
            self._kinds[key] = kind

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """These lie in host memory: their storages do not count, and copies of them are moves."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._host[id(storage)] = storage  # held, so that no other one has its number
            self._forget(id(storage))(None)

    def start_phase(self) -> None:
        """Forget the peak, the arithmetic and the moves so far."""
        self.peak, self.moved, self._rising = self.total, 0, True
        self._flops_before = self._calls.flops

    @property
    def flops(self) -> int:
        """Floating-point operations of matrix products, convolutions and attention since `start_phase`."""
        return self._calls.flops - self._flops_before

    @property
    def at_peak(self) -> Counter[str]:
        """`live` when the total was at its peak."""
        self._keep_peak()
        return self._at_peak

    def _keep_peak(self) -> None:
        """Before the total falls, or is split otherwise: what it was made of, if it is the largest so far."""
        if self._rising:
            self._at_peak, self._rising = self.live.copy(), False

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._storages or key in self._host or storage.device != META:
            return
        size = storage.nbytes()
        self._storages[key] = (weakref.ref(storage, self._forget(key)), size)
        self._kinds[key] = ACTIVATIONS
        self.live[ACTIVATIONS] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self._rising = self.total, True

    def _forget(self, key: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            if key not in self._storages:
                return  # left out
            self._keep_peak()
            size = self._storages.pop(key)[1]
            self.live[self._kinds.pop(key)] -= size
            self.total -= size

        return forget
