"""Weights from other tools under the names of our networks; what does not fit is named and refused."""

from collections.abc import Mapping

from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.formats.compare import compare_state

_CONSTANT = ".resample_filter"


def fit_network(tensors: Mapping[str, Tensor], network: Denoiser, what: str, where: str) -> dict[str, Tensor]:
    """A state dict for `network`; EDM's constant resampling filters may be missing, or be where we need none.

    Args:
        tensors: under EDM's keys (`model.*`), or a diffusers network's own.
        network: the network they should fit; on the meta device it does as well.
        what: the role, as messages call it.
        where: the source, as messages call it.

    Raises:
        UserError: tensors are missing, unexpected or of another shape (names some), or `network` is a LoRA.
    """
    if network.base_network is not network:
        raise UserError(f"{where}: its {what} is a full network, and no LoRA can start as one; set memory.mode=full")
    own = network.state_dict()
    prefix = network.own_prefix
    found = {prefix + name.removeprefix(prefix): value for name, value in tensors.items()}
    constants = {name: value for name, value in own.items() if name.endswith(_CONSTANT)}
    needed = {name: value for name, value in found.items() if name in own or not name.endswith(_CONSTANT)}
    compare_state({**constants, **needed}, own, what, where)
    return _unshared({name: found.get(name, own[name]) for name in own})


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Clones where two names share one tensor, because safetensors stores none twice."""
    seen: set[int] = set()
    for name, value in tensors.items():
        if id(value) in seen:
            tensors[name] = value.clone()
        seen.add(id(value))
    return tensors
