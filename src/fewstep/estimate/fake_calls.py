"""Operations on fake tensors, each worked out once: a network repeats few of them many times.

torch's own fake mode remembers calls too, but at a price a call that makes it most of a rehearsal.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Output:
    """One output of a call.

    Attributes:
        same: number of the tensor argument that it is (operations in place).
        view_of: number of the tensor argument whose storage it shares.
    """

    same: int | None
    view_of: int | None
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Recipe:
    """All outputs of a call, as `Output` or the constant itself; `kind`: the sequence they come in, None for one alone."""

    kind: type | None
    outputs: tuple[Any, ...]


class FakeCalls:
    """Runs operations under a `FakeTensorMode`; one with the shapes, types and numbers of an earlier one is repeated."""

    def __init__(self) -> None:
        self._recipes: dict[Any, Recipe] = {}
        self._attributes: dict[str, Any] = {}  # what the mode gives to each fake tensor that an operation makes

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
        """What the operation returns, and those of its outputs that may have storages of their own."""
        tensors: list[Tensor] = []
        try:
            key = (func, _token(args, tensors), *((name, _token(value, tensors)) for name, value in kwargs.items()))
            recipe = self._recipes.get(key)
        except (_ValueMattersError, TypeError):  # or an argument cannot be hashed
            return _all_of(func(*args, **kwargs))
        if recipe is not None:
            try:
                return self._repeat(recipe, tensors)
            except (AttributeError, RuntimeError, TypeError):  # other fake tensors than this torch's: only slower
                self._recipes.clear()
        shapes = [_shape(tensor) for tensor in tensors]
        made = func(*args, **kwargs)
        if shapes == [_shape(tensor) for tensor in tensors]:  # else an argument was resized
            self._learn(key, tensors, made)
        return _all_of(made)

    def _learn(self, key: Any, tensors: list[Tensor], made: Any) -> None:
        kind = type(made) if type(made) in (list, tuple) else None
        parts = (made,) if kind is None else made
        outputs = _outputs(parts, tensors)
        if outputs is None:
            return
        self._recipes[key] = Recipe(kind, outputs)
        if not self._attributes:
            for part, output in zip(parts, outputs, strict=True):
                if isinstance(output, Output) and output.same is None:
                    self._attributes = dict(vars(part))

    def _repeat(self, recipe: Recipe, tensors: list[Tensor]) -> tuple[Any, list[Tensor]]:
        made, fresh = [], []
        for output in recipe.outputs:
            if not isinstance(output, Output):
                made.append(output)
            elif output.same is not None:
                made.append(tensors[output.same])
            else:
                made.append(self._make(output, tensors))
                if output.view_of is None:
                    fresh.append(made[-1])
        return (made[0] if recipe.kind is None else recipe.kind(made)), fresh

    def _make(self, output: Output, tensors: list[Tensor]) -> Any:
        with torch._C._DisableTorchDispatch():
            if output.view_of is None:
                plain = torch.empty_strided(output.size, output.stride, dtype=output.dtype, device="meta")
            else:
                storage: Any = tensors[output.view_of].untyped_storage()
                plain = torch.empty(0, dtype=output.dtype, device="meta")
                plain.set_(storage, output.offset, output.size, output.stride)
        kind: Any = Tensor._make_subclass
        made = kind(FakeTensor, plain, False, dispatch_device=True, device_for_backend_keys=_CPU)
        vars(made).update(self._attributes)
        return made


class _ValueMattersError(Exception):
    """Another call with the same shapes may end otherwise."""


def _token(value: Any, tensors: list[Tensor]) -> Any:
    """What an operation's outputs may depend on in an argument; its tensors are added to `tensors`."""
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None:
            raise _ValueMattersError
        tensors.append(value)
        return _shape(value)
    if isinstance(value, Tensor):
        raise _ValueMattersError
    if kind is list or kind is tuple:
        return (kind, *(_token(part, tensors) for part in value))
    return kind, value  # 1, 1.0 and True are equal, and give other types


def _shape(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.storage_offset()


def _outputs(made: Iterable[Any], tensors: list[Tensor]) -> tuple[Any, ...] | None:
    """How each output came about; None where it cannot be made again from shapes alone."""
    found: list[Any] = []
    known = [tensor.untyped_storage()._cdata for tensor in tensors]
    new: set[int] = set()
    for part in made:
        if part is None or type(part) in (bool, int, float):
            found.append(part)
            continue
        if type(part) is not FakeTensor:
            return None
        same = next((number for number, tensor in enumerate(tensors) if tensor is part), None)
        storage = part.untyped_storage()
        view_of = known.index(storage._cdata) if storage._cdata in known else None
        output = Output(same, view_of, tuple(part.shape), part.stride(), int(part.storage_offset()), part.dtype)
        plain = part.constant is None and part.fake_device == _CPU and not (part.is_conj() or part.is_neg())
        if same is None and (part.requires_grad or part.layout != torch.strided or not plain):
            return None
        if view_of is None and (storage._cdata in new or storage.nbytes() != _num_bytes(output)):
            return None
        new.add(storage._cdata)
        found.append(output)
    return tuple(found)


def _num_bytes(output: Output) -> int:
    """Of a storage that holds this tensor and nothing else."""
    if 0 in output.size:
        return 0
    last = output.offset + sum((size - 1) * stride for size, stride in zip(output.size, output.stride, strict=True))
    return -1 if output.offset else (last + 1) * output.dtype.itemsize


def _all_of(made: Any) -> tuple[Any, list[Tensor]]:
    return made, [part for part in tree_leaves(made) if isinstance(part, Tensor)]
