"""Operations on the meta device, each worked out once: a network repeats few of them many times.

torch works out shapes in Python, at 0.2 ms an operation; what an earlier call with the same shapes, types and numbers
gave is made again in a tenth of that.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

META = torch.device("meta")


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
    """All outputs of a call, as `Output` or the constant itself; `kind`: the sequence they come in, None for one alone.

    Attributes:
        flops: floating-point operations of the call.
    """

    kind: type | None
    outputs: tuple[Any, ...]
    flops: int


class Calls:
    """Runs operations on meta tensors; one with the shapes, types and numbers of an earlier one is repeated.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention so far.
    """

    def __init__(self) -> None:
        self._recipes: dict[Any, Recipe | None] = {}
        self.flops = 0

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the operation returns. Real numbers (a noise schedule's table) may be among its arguments."""
        view = _VIEWS.get(func)
        if view is not None and args[0].is_meta:  # torch's own way is as short
            return view(*args, **kwargs)
        tensors: list[Tensor] = []
        try:
            key = _key(func, args, kwargs, tensors)
            recipe = self._recipes.get(key)
        except TypeError:  # an argument cannot be hashed
            return self._ask(func, args, kwargs)
        if recipe is not None:
            self.flops += recipe.flops
            return _repeat(recipe, tensors)
        real = [not tensor.is_meta for tensor in tensors]
        if any(real):
            return self._ask(func, args if all(real) else _on_meta(args), kwargs)
        before, made = self.flops, self._ask(func, args, kwargs)
        if key not in self._recipes:
            self._recipes[key] = _learn(key, tensors, made, args, kwargs, self.flops - before)
        return made

    def _ask(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """torch's own answer."""
        made = func(*args, **kwargs)
        count = _FLOPS.get(getattr(func, "overloadpacket", None))
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=made)
        return made


_aten = torch.ops.aten


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


_FLOPS: dict[Any, Callable[..., int]] = flop_registry | {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


# Views that one kernel of torch makes; what they view must be on the meta device.
_PLAIN_VIEWS = {
    _aten.view.default, _aten.detach.default, _aten.t.default, _aten.transpose.int, _aten.permute.default,
    _aten.unsqueeze.default, _aten.expand.default, _aten.alias.default,
}  # fmt: skip
_VIEWS = {view: view for view in _PLAIN_VIEWS}
_VIEWS[_aten._unsafe_view.default] = _aten.view.default  # the same, which torch takes a detour through Python for


def _key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
    """What an operation's outputs may depend on; its tensors are added to `tensors`."""
    if not kwargs:
        return func, _tokens(args, tensors)
    return func, _tokens(args, tensors), tuple(kwargs), _tokens(kwargs.values(), tensors)


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(META)
    return type(value)(_on_meta(part) for part in value) if type(value) in (list, tuple) else value


def _tokens(values: Iterable[Any], tensors: list[Tensor]) -> tuple[Any, ...]:
    found: list[Any] = []
    for value in values:
        kind = type(value)
        if kind is list or kind is tuple:
            found.append((kind, _tokens(value, tensors)))
        elif isinstance(value, Tensor):
            tensors.append(value)
            found += (value.shape, value.stride(), value.dtype, value.storage_offset(), value.is_meta)
        else:
            found += (kind, value)  # 1, 1.0 and True are equal, and give other types
    return tuple(found)


def _learn(
    key: Any, tensors: list[Tensor], made: Any, args: Any, kwargs: dict[str, Any], flops: int
) -> Recipe | None:  # fmt: skip
    """How each output came about; None where it cannot be made again from shapes alone."""
    if _key(key[0], args, kwargs, []) != key:  # an argument was resized
        return None
    kind = type(made) if type(made) in (list, tuple) else None
    outputs: list[Any] = []
    new: set[int] = set()
    known = [id(tensor.untyped_storage()) for tensor in tensors]
    for part in (made,) if kind is None else made:
        if part is None or type(part) in (bool, int, float):
            outputs.append(part)
            continue
        if (
            not isinstance(part, Tensor)
            or part.layout != torch.strided
            or not part.is_meta
            or part.is_conj()
            or part.is_neg()
        ):
            return None
        same = next((number for number, tensor in enumerate(tensors) if tensor is part), None)
        storage = part.untyped_storage()
        view_of = known.index(id(storage)) if id(storage) in known else None
        output = Output(same, view_of, tuple(part.shape), part.stride(), int(part.storage_offset()), part.dtype)
        if view_of is None and (id(storage) in new or storage.nbytes() != _num_bytes(output)):
            return None
        new.add(id(storage))
        outputs.append(output)
    return Recipe(kind, tuple(outputs), flops)


def _num_bytes(output: Output) -> int:
    """Of a storage that holds this tensor and nothing else."""
    if 0 in output.size:
        return 0
    last = output.offset + sum((size - 1) * stride for size, stride in zip(output.size, output.stride, strict=True))
    return -1 if output.offset else (last + 1) * output.dtype.itemsize


def _repeat(recipe: Recipe, tensors: list[Tensor]) -> Any:
    made = [_make(output, tensors) if isinstance(output, Output) else output for output in recipe.outputs]
    return made[0] if recipe.kind is None else recipe.kind(made)


def _make(output: Output, tensors: list[Tensor]) -> Tensor:
    if output.same is not None:
        return tensors[output.same]
    if output.view_of is None:
        return torch.empty_strided(output.size, output.stride, dtype=output.dtype, device=META)
    storage: Any = tensors[output.view_of].untyped_storage()
    return torch.empty(0, dtype=output.dtype, device=META).set_(storage, output.offset, output.size, output.stride)
