"""A network from a stranger's description, before a byte is allocated: on the meta device, and of bounded size."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

T = TypeVar("T")
_MAX_PARTS = 20_000  # layers and tensors together; SDXL has 3,600


def build_untrained(make: Callable[[], T]) -> T:
    """What `make` builds, on the meta device, where shapes take no memory.

    One absurd number of layers would still take any time and memory, so parts are counted as they are added.

    Raises:
        ValueError: it has more parts than any network here.
    """
    with _counted(), torch.device("meta"):
        return make()


def num_values(module: nn.Module) -> int:
    """Numbers in a network's parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def computed_buffers(module: nn.Module) -> list[str]:
    """Names of tensors that a network works out when it is built and no state dict has: on the meta device they would be nothing."""
    stored = module.state_dict().keys()
    return [name for name, _ in module.named_buffers() if name not in stored]


@contextmanager
def _counted() -> Iterator[None]:
    """Count what this thread adds to modules; raises ValueError where it is too much."""
    thread, left = threading.get_ident(), _MAX_PARTS

    def count(module: nn.Module, name: str, part: object) -> None:
        nonlocal left
        if threading.get_ident() == thread:
            left -= 1
            if left < 0:
                raise ValueError(f"it describes more than {_MAX_PARTS} layers and tensors")

    hooks = [register_module_parameter_registration_hook(count), register_module_module_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
