"""Writes EDM checkpoint pickles, so that a teacher trained here reaches the tools that read EDM's format."""

from __future__ import annotations

import contextlib
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.formats.atomic import replaced_file
from fewstep.formats.edm_pickle import plain_value

_BUFFERS = ("resample_filter", "map_noise.freqs")


def write_edm_pickle(
    path: str | Path,
    state_dict: Mapping[str, Tensor],
    init_kwargs: Mapping[str, Any],
    class_name: str = "EDMPrecond",
) -> None:
    """Write `{'ema': module}` in the layout of EDM's checkpoints, whole or not at all.

    Every module is one call of `torch_utils.persistence._reconstruct_persistent_obj` on a dict with `type`,
    `version`, `module_src`, `class_name` and `state`; tensors are pickled the way pickle.dump pickles them.

    Differs: `module_src` is the empty string, for that text is EDM's own code. Readers that take only tensors
        and constructor arguments (`read_edm_pickle`) need no more; EDM's own loader builds its classes from
        that text and cannot load the file. Modules below `model` get the class name `Module` and no
        arguments: a state dict does not say what they were.

    Not for two threads at once: pickle.dump imports the function it names, which is there only meanwhile.

    Source: METHOD.md section 7.

    Args:
        path: file to write, replaced if it exists.
        state_dict: tensors of any shape under EDM's names, written in their own dtypes; keys ending in
            `resample_filter` or `map_noise.freqs` become buffers, all others parameters.
        init_kwargs: constructor arguments of the preconditioning module, plain values only; `model_type`,
            if there, also becomes the class name of the network under `model.`.
        class_name: the preconditioning class.

    Raises:
        ValueError: the state dict is empty or holds something other than tensors, or a constructor argument
            is not a plain value. UserError: the file cannot be written.
    """
    if not state_dict:
        raise ValueError("state_dict is empty: there is nothing to write")
    kwargs = plain_value(dict(init_kwargs))
    root = _PersistentModule(class_name, kwargs)
    for key, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"state_dict[{key!r}] is a {type(tensor).__name__}, not a tensor")
        root.insert(key, tensor)
    network = root.modules.get("model")
    if network is not None:
        network.class_name = str(kwargs.get("model_type", network.class_name))

    with replaced_file(Path(path)) as aside, aside.open("wb") as file, _importable_reconstructor():
        pickle.dump({"ema": root}, file)


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
    """Stands for EDM's function of this name while pickling; never called."""


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class _PersistentModule:
    """One module of the tree; pickles as EDM's persistent classes do."""

    def __init__(self, class_name: str, init_kwargs: dict[str, Any]) -> None:
        self.class_name = class_name
        self.init_kwargs = init_kwargs
        self.parameters: OrderedDict[str, Tensor] = OrderedDict()
        self.buffers: OrderedDict[str, Tensor] = OrderedDict()
        self.modules: OrderedDict[str, _PersistentModule] = OrderedDict()

    def insert(self, key: str, tensor: Tensor) -> None:
        *path, name = key.split(".")
        module = self
        for part in path:
            module = module.modules.setdefault(part, _PersistentModule("Module", {}))
        # A copy: of a view, pickle would write everything the view looks into.
        value = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if key.endswith(_BUFFERS):
            module.buffers[name] = value
        else:
            module.parameters[name] = torch.nn.Parameter(value, requires_grad=False)

    def __reduce__(self) -> tuple[Any, tuple[dict[str, Any]]]:
        state = {
            "training": False,
            "_parameters": self.parameters,
            "_buffers": self.buffers,
            "_non_persistent_buffers_set": set(),
            "_modules": self.modules,
            "_init_args": (),
            "_init_kwargs": self.init_kwargs,
        }
        meta = {"type": "class", "version": 6, "module_src": "", "class_name": self.class_name}
        return _reconstruct_persistent_obj, ({**meta, "state": state},)


@contextlib.contextmanager
def _importable_reconstructor() -> Iterator[None]:
    """Let `torch_utils.persistence` be imported for as long as pickle looks for it there."""
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")
    setattr(module, _reconstruct_persistent_obj.__name__, _reconstruct_persistent_obj)
    ours = {"torch_utils": package, "torch_utils.persistence": module}
    theirs = {name: sys.modules.get(name) for name in ours}
    sys.modules.update(ours)
    try:
        yield
    finally:
        for name, original in theirs.items():
            if original is None:
                del sys.modules[name]
            else:
                sys.modules[name] = original
