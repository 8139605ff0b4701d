"""Repeated operations on the meta device give what torch itself gives, without asking it again."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fewstep.estimate.calls import Calls


class Watched(TorchDispatchMode):
    """Runs everything through `Calls`; counts what still reaches torch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.asked = Calls(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def ask(*given: Any, **named: Any) -> Any:
            self.asked += 1
            return func(*given, **named)

        return self.calls(Named(func, ask), args, kwargs or {})


class Direct(TorchDispatchMode):
    """Runs everything through the given calls."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.calls(func, args, kwargs or {})


class Named:
    """An operation that can be watched, equal to itself."""

    def __init__(self, func: Any, run: Callable[..., Any]) -> None:
        self.func, self.run = func, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def __hash__(self) -> int:
        return hash(self.func)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Named) and self.func is other.func


@pytest.fixture
def watched() -> Iterator[Watched]:
    with torch.device("meta"), Watched() as mode:
        yield mode


def facts(made: Any) -> list[Any]:
    """What is to be the same: shapes, strides, types, gradients; constants as they are."""
    parts = made if isinstance(made, list | tuple) else [made]
    return [
        (part.shape, part.stride(), part.dtype, part.storage_offset(), part.device, part.requires_grad,
         part.untyped_storage().nbytes()) if isinstance(part, Tensor) else part
        for part in parts
    ]  # fmt: skip


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "new": lambda x: x * 2.0,
    "other type": lambda x: x.to(torch.bfloat16),
    "matrix": lambda x: x.reshape(8, 15) @ torch.ones(15, 4),
    "transposed": lambda x: x.transpose(0, 2),
    "part": lambda x: x[1:, 1],
    "several views": lambda x: x.split(2, dim=2),
    "several new": lambda x: torch.ops.aten.native_layer_norm(x, [5], None, None, 1e-5),
    "list in": lambda x: torch.cat([x, x], dim=1),
    "factory": lambda x: torch.zeros(3, 4, dtype=torch.float16),
    "convolution": lambda x: F.conv1d(x.reshape(2, 12, 5), torch.ones(6, 12, 3)),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_second_call_is_like_the_first(watched: Watched, name: str) -> None:
    run = OPERATIONS[name]
    first = run(torch.zeros(4, 6, 5))
    asked, again = watched.asked, run(torch.zeros(4, 6, 5))
    assert facts(again) == facts(first)
    assert watched.asked == asked
    other = run(torch.zeros(4, 6, 5, dtype=torch.float64)) if name not in ("matrix", "convolution") else None
    assert other is None or name == "factory" or watched.asked > asked


def test_gradients_are_those_of_torch(watched: Watched) -> None:
    """Twice through a small network and back; the second time nothing is new."""
    asked, found = list[int](), list[Any]()
    for _ in range(2):
        weight, x = torch.zeros(7, 5, requires_grad=True), torch.zeros(3, 5)
        y = F.silu(F.linear(x, weight)).view(21)
        y.sum().backward()
        found.append(facts([y, weight.grad]))
        asked.append(watched.asked)
    assert found[0] == found[1]
    assert weight.grad is not None
    assert asked[0] == asked[1] > 0


@pytest.mark.parametrize("name", ["matrix", "convolution", "attention", "new"])
def test_arithmetic_is_counted_once_for_each_shape(
    watched: Watched, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch counts the first call; what is repeated adds as much."""
    with FlopCounterMode(display=False) as counter:
        OPERATIONS[name](torch.zeros(4, 6, 5))
    direct = Calls()
    with Direct(direct):
        OPERATIONS[name](torch.zeros(4, 6, 5))
        monkeypatch.setattr("fewstep.estimate.calls._FLOPS", {})
        OPERATIONS[name](torch.zeros(4, 6, 5))
    assert direct.flops == 2 * counter.get_total_flops()
    assert (direct.flops > 0) == (name != "new")


def test_views_share_and_new_tensors_do_not(watched: Watched) -> None:
    x = torch.zeros(4, 6)
    for _ in range(2):
        view, new = x[1:].t(), x + 1.0
        assert view.untyped_storage() is x.untyped_storage()
        assert new.untyped_storage() is not x.untyped_storage()
        assert x.add_(1.0) is x


def test_numbers_of_other_types_are_other_calls(watched: Watched) -> None:
    whole = torch.zeros(3, dtype=torch.int64)
    assert [(whole + number).dtype for number in (1, 1.0, True, 1)] == [
        torch.int64, torch.float32, torch.int64, torch.int64,
    ]  # fmt: skip


def test_a_resized_argument_is_asked_each_time(watched: Watched) -> None:
    for _ in range(2):
        x = torch.zeros(2)
        x.resize_(5)
        assert x.shape == (5,)


def test_real_numbers_meet_shapes(watched: Watched) -> None:
    """A noise schedule's table is real: alone it stays so, indexed by shapes it gives a shape."""
    table = torch.arange(4.0, device="cpu")
    assert (table * 2)[3].item() == 6
    for _ in range(2):
        found = table[torch.zeros(5, dtype=torch.int64)]
        assert (found.device.type, found.shape, found.dtype) == ("meta", (5,), torch.float32)
