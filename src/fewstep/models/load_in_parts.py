"""A teacher of a run of several processes: it lies in parts before it has weights, and each process reads its own rows of them."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.distillation.sharding import Spread, fill_parts, shard_network
from fewstep.errors import UserError
from fewstep.families.family import Family
from fewstep.families.registry import build_on_meta, recognise
from fewstep.formats.compare import state_difference
from fewstep.formats.source import Source
from fewstep.formats.stored_tensors import ReadRows, Rows, StoredTensors
from fewstep.formats.tensor_files import refuse_infinities
from fewstep.models.load import FoundTeacher, loras_for
from fewstep.models.model import Model
from fewstep.networks.merged_loras import ReadLoras, with_loras
from fewstep.networks.untrained import computed_buffers
from fewstep.progress import tell
from fewstep.shared_work import by_all


def load_teacher_in_parts(
    source: str | Path,
    spread: Spread,
    prepare: Callable[[Denoiser], object],
    *,
    resolution: int = 0,
    loras: Sequence[str] = (),
) -> Model | None:
    """As `load_teacher`, bit for bit, but no process ever has the network whole: beside its parts it holds one tensor's rows, and of a
    layer with LoRAs the update that they make. None where only a whole network can be read, which is told in a line.

    Args:
        spread: over which processes.
        prepare: called with the network on the meta device, before it is sharded.

    Raises:
        UserError: as `load_teacher`, and of `prepare`.
    """
    place = FoundTeacher.at(source, loras)
    network = _untrained(place, resolution)
    stored = None if network is None else _stored(place.family, place.folder, network)
    everywhere = all(by_all(lambda: stored is not None))  # all read the same way, whatever one of them finds
    if network is None or stored is None or not everywhere:
        tell(
            f"note: each process reads {source} whole before it lies in parts: its file does not hold the network's tensors as it has them"
        )
        return None
    added = loras_for(network, place.loras)
    prepare(network)
    shard_network(network, spread.mesh, offload=spread.on_host)
    by_all(partial(_fill, network, stored, added, spread.on_host))
    return place.model(network)


def _fill(network: Denoiser, stored: StoredTensors, loras: ReadLoras, on_host: bool) -> None:
    with stored.opened() as read:
        fill_parts(network, with_loras(partial(_finite, stored, read), stored.shapes, loras), on_host=on_host)


def _finite(stored: StoredTensors, read: ReadRows, name: str, rows: Rows) -> Tensor:
    """Rows of a tensor; raises UserError that names it where there are numbers among them that are none."""
    part, place = read(name, rows), stored.places[name]
    refuse_infinities({place.name: part}, str(place.path))
    return part


def reads_parts(source: str | Path, network: Denoiser) -> bool:
    """Whether a teacher would be read in parts, as far as it is known: its path may be empty, or lead nowhere yet.

    Args:
        network: the teacher's, on the meta device.
    """
    folder = Source.parse(source).of_role("teacher") if source else None
    if folder is None or not folder.is_dir():
        return folder is None or folder.suffix.lower() != ".pkl"
    try:
        return _stored(recognise(folder), folder, network) is not None
    except UserError:  # which a run will say
        return True


def _untrained(place: FoundTeacher, resolution: int) -> Denoiser | None:
    """The network on the meta device; None where its description is wrong, which `load` has words for."""
    description = place.family.describe_folder(place.folder, resolution)
    try:
        return build_on_meta(description)
    except UserError:
        raise
    except Exception:  # a wrong value ends in any kind
        return None


def _stored(family: Family, folder: Path, network: Denoiser) -> StoredTensors | None:
    """The network's tensors where they lie; None where it has others, or needs some that are in no file: `load` knows, or says, why."""
    try:
        stored = family.stored_weights(folder)
    except UserError:  # which `load` has words for
        return None
    if stored is None or not stored.are_floats or computed_buffers(network):
        return None
    return None if state_difference(stored.shapes, network.state_dict()) else stored
