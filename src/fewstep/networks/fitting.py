"""Weights from other tools under the names of our networks; what does not fit is named and refused."""

from collections.abc import Mapping

from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.families.diffusers_denoiser import DiffusersDenoiser
from fewstep.families.edm.denoiser import EDMDenoiser

_NETWORK = "network."  # where a Denoiser keeps its diffusers network
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
    if not isinstance(network, DiffusersDenoiser | EDMDenoiser):
        raise UserError(f"{where}: its {what} is a full network, and no LoRA can start as one; set memory.mode=full")
    own = network.state_dict()
    prefix = _NETWORK if isinstance(network, DiffusersDenoiser) else ""
    found = {prefix + name.removeprefix(prefix): value for name, value in tensors.items()}
    missing = [name for name in own if name not in found and not name.endswith(_CONSTANT)]
    unexpected = [name for name in found if name not in own and not name.endswith(_CONSTANT)]
    shapes = [
        f"{name} {tuple(found[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in found and own[name].shape != found[name].shape
    ]
    if missing or unexpected or shapes:
        raise UserError(
            f"{where}: its {what} is another network than expected: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(shapes)} of another shape {shapes[:3]}"
        )
    return _unshared({name: found.get(name, own[name]) for name in own})


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Clones where two names share one tensor, because safetensors stores none twice."""
    seen: set[int] = set()
    for name, value in tensors.items():
        if id(value) in seen:
            tensors[name] = value.clone()
        seen.add(id(value))
    return tensors
