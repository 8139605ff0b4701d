"""The pickle inside torch.save's files: a state dict described as records, with no call but the few it consists of."""

import re
from collections.abc import Callable
from typing import Any

from fewstep.formats.inert_pickle import Budget, InertMachine, PersistentId, expect, type_name
from fewstep.formats.pickled_tensors import STORAGE_DTYPES, PickledStorage, PickledTensor, checked_tensor

MAX_NAME = 512
_KIND = "state dict"
# entries beside the network that makes pictures, which may be state dicts too
_OTHER_ROLE = re.compile(r"optim|sched|scaler|fake|real|teacher|critic|guidance|discriminator|loss", re.IGNORECASE)
_PARAMETER = "torch.nn.parameter.Parameter"  # torch before 0.4 saved parameters as themselves
_CALLS = frozenset(
    {
        "collections.OrderedDict", "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter", _PARAMETER,
    }
)  # fmt: skip
# Ten times what the fake score and teacher of SDXL take together; more is built to keep us busy.
_MAX_STEPS = 1_000_000


class StateDictMachine(InertMachine):
    """The machine with the calls that a state dict consists of.

    Args:
        storage: the elements that a persistent id stands for.
    """

    other_keys = (int,)  # of an optimiser's state

    def __init__(self, storage: Callable[[object], PickledStorage]) -> None:
        super().__init__(_CALLS | frozenset(STORAGE_DTYPES), Budget(_MAX_STEPS, _KIND))
        self._storage = storage

    def record(self, name: str, args: tuple[object, ...]) -> object:
        match name, args:
            case "collections.OrderedDict", ():
                return {}
            case "collections.OrderedDict", (list() as pairs,):  # of Python 2
                return {expect(str, key): value for key, value in map(_pair, pairs)}
            case "torch._utils._rebuild_tensor", (PersistentId(value=reference), offset, size, stride):
                return checked_tensor(self._storage(reference), offset, size, stride)
            case "torch._utils._rebuild_tensor_v2", (PersistentId(value=reference), offset, size, stride, _, _, *_):
                return checked_tensor(self._storage(reference), offset, size, stride)
            case "torch._utils._rebuild_parameter", (PickledTensor() as tensor, _, _):
                return tensor
            case "torch.nn.parameter.Parameter", (PickledTensor() as tensor, *_):
                return tensor
        return super().record(name, args)

    def set_state(self, target: object, state: object) -> None:
        if isinstance(target, PickledTensor):  # hooks and flags of an old parameter
            expect(tuple, state)
        else:
            expect(dict, target)  # `_metadata` of a state dict: versions of its modules


def _pair(value: object) -> tuple[object, object]:
    key, item = expect(list, list(value) if isinstance(value, tuple) else value)
    return key, item


def _only_state_dict(content: dict[Any, Any]) -> object:
    """The one state dict that a training framework wrapped, with counters or the optimiser's state beside it.

    Raises:
        ValueError: there are several, such as an average beside the weights.
    """
    found = [
        name
        for name, value in content.items()
        if isinstance(value, dict)
        and value
        and all(isinstance(part, PickledTensor) for part in value.values())
        and not _OTHER_ROLE.search(str(name))
    ]
    if len(found) > 1:
        shown = ", ".join(repr(str(name)[:60]) for name in found[:4])
        raise ValueError(f"it holds several state dicts ({shown}): save the one that you mean in a file of its own")
    if len(found) == 1 and not any(isinstance(value, PickledTensor) for value in content.values()):
        return content[found[0]]
    return content.get("state_dict", content)


def state_dict_records(content: object) -> dict[str, PickledTensor]:
    """The tensors of an unpickled state dict, or of one under `state_dict`; raises ValueError for anything else."""
    if isinstance(content, dict) and any(isinstance(value, dict) for value in content.values()):
        content = _only_state_dict(content)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type_name(type(content))}, not a state dict")
    for name, value in content.items():
        expect(str, name)
        if not isinstance(value, PickledTensor):
            raise ValueError(f"its entry {name[:MAX_NAME]!r} is a {type_name(type(value))}, not a tensor")
        if len(name) > MAX_NAME:
            raise ValueError("one of its tensors has an endless name")
    return content
