"""Networks spread over processes: each by itself, block by block, with torch's `fully_shard`.

Trained full networks are always sharded, with their discriminator. Adapters are small and stay outside: every process has
them whole and their gradients are averaged once a step, so a sharded base under them exchanges no gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from fewstep.devices import device_of
from fewstep.diffusion.denoiser import Denoiser
from fewstep.errors import UserError
from fewstep.formats.stored_tensors import ReadRows, Rows
from fewstep.parallel import agreed, is_first, rank, receive, send_to_the_first, world_size
from fewstep.shared_work import by_the_first

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Placement = Literal["sharded", "replicated", "offloaded", "offloaded_blocks"]


@dataclass(frozen=True)
class Spread:
    """How the networks of a run lie in its processes.

    Attributes:
        mesh: one row of processes that share one copy, or several rows with a copy each.
        teacher: of the frozen weights: a part in every process, a copy in every process (its blocks in host memory or not), or a part in host memory.
    """

    mesh: "DeviceMesh"
    teacher: Placement

    @property
    def in_parts(self) -> bool:
        """Whether no process has the teacher whole."""
        return self.teacher in ("sharded", "offloaded")

    @property
    def on_host(self) -> bool:
        """Whether the teacher's parts lie in host memory."""
        return self.teacher == "offloaded"


def build_spread(device: torch.device, teacher: Placement, shard_over: int) -> Spread | None:
    """None where there is one process.

    Args:
        shard_over: processes that share one copy of the networks; 0: all of them.

    Raises:
        UserError: they do not divide the processes there are.
    """
    processes = world_size()
    if processes == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    if not shard_over or shard_over == processes:
        return Spread(init_device_mesh(device.type, (processes,), mesh_dim_names=("shard",)), teacher)
    if processes % shard_over:
        raise UserError(
            f"memory.shard_over={shard_over} does not divide {processes} processes; 0 shards over all of them"
        )
    shape = (processes // shard_over, shard_over)
    return Spread(init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")), teacher)


def spread_of(network: Denoiser, teacher: Placement, shard_over: int) -> Spread | None:
    """As `build_spread` on the network's device; how it lies where that was settled when it was read."""
    mesh = mesh_of(network)
    return build_spread(device_of(network), teacher, shard_over) if mesh is None else Spread(mesh, teacher)


def spread_teacher(teacher: Denoiser, spread: Spread | None) -> None:
    """Shard the frozen network before anything is built from it, so that nothing after it is ever whole."""
    if spread is not None and spread.in_parts and mesh_of(teacher) is None:
        shard_network(teacher, spread.mesh, offload=spread.on_host)


def shard_network(network: Denoiser, mesh: "DeviceMesh", *, offload: bool = False) -> None:
    """Shard a network part by part; on the meta device its weights are filled in later.

    In half precision weights are gathered in it, gradients are added up in float32, and what is trained stays float32;
    inputs come as they are, because everything outside of the network is float32.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    half = network.compute_dtype != torch.float32
    options: dict[str, Any] = {
        # the root too: its copy from a forward without a backward, as of sample pictures, would outlive an update
        "reshard_after_forward": True,
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=network.compute_dtype if half else None, reduce_dtype=torch.float32 if half else None,
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy(),
    }  # fmt: skip
    for part in network.sharded_parts():
        fully_shard(part, **options)
    fully_shard(network, **options)


def shard_head(head: nn.Module, beside: nn.Module) -> None:
    """Shard the discriminator where the network whose optimiser trains it is sharded: that has parameters of one kind."""
    mesh = mesh_of(beside)
    if mesh is not None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(head, mesh=mesh)


def mesh_of(module: nn.Module) -> "DeviceMesh | None":
    """The processes that a module's parameters are spread over; None where each has them whole."""
    parts: Iterator[Any] = module.parameters()
    return next((part.device_mesh for part in parts if is_sharded(part)), None)


def as_placed(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as the tensors `like` of the same names lie in the processes: of a whole one each takes its own part."""
    placed: dict[str, Tensor] = {}
    parts: Any = like
    for name, value in weights.items():
        own = parts.get(name)
        if own is not None and is_sharded(own) and not is_sharded(value):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(
                value.detach().to(own.device_mesh.device_type), own.device_mesh, own.placements, src_data_rank=None
            )
        elif own is not None and not is_sharded(own):
            value = whole(value)
        placed[name] = value
    return placed


@torch.no_grad()
def fill_parts(network: nn.Module, read: ReadRows, *, on_host: bool = False) -> None:
    """Give a network that was sharded on the meta device its weights: of each tensor a process asks for its own rows alone.

    Args:
        read: gives rows of a tensor of the network's state dict; they are copied before the next ones are asked for.
        on_host: whether parts lie in host memory.
    """
    place = device_of(network)
    network.to_empty(device="cpu" if on_host else place)
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):  # never sharded
            setattr(module, name, buffer.to(place))
    for name, own in network.state_dict().items():
        local(own).copy_(read(name, own_rows(own)))


def own_rows(tensor: Any) -> Rows:
    """Which rows this process has of a tensor, split as `fully_shard` does it; None: all of one that is whole."""
    if not is_sharded(tensor):
        return None
    assert tensor.placements[-1].is_shard(0), "as `fully_shard` does it"
    count, mesh = len(tensor), tensor.device_mesh
    each = -(-count // mesh.size(-1))
    first = min(count, each * mesh.get_local_rank(mesh.ndim - 1))
    return slice(first, min(count, first + each))


def put_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """`load_state_dict`, also of whole tensors into a sharded module."""
    module.load_state_dict(as_placed(weights, module.state_dict()))


def synchronise(modules: Iterable[Any], now: bool) -> None:
    """Whether the next backward passes exchange gradients, or only add them up for a later one that does."""
    for module in modules:
        if hasattr(module, "set_requires_gradient_sync"):  # what `fully_shard` makes of a module
            module.set_requires_gradient_sync(now)


def is_sharded(tensor: Any) -> bool:
    """Whether each process has its part; asked without importing torch's distributed tensors, which takes a second."""
    return hasattr(tensor, "placements")


def local(tensor: Any) -> Tensor:
    """This process's part of a sharded tensor; the tensor itself where it is whole."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def whole(tensor: Any) -> Tensor:
    """A sharded tensor put together on every process; the tensor itself where it is whole. All must ask together."""
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return found


def written_by_the_first(write: Callable[[Callable[[Any], Tensor]], None], tensors: Iterable[Any]) -> None:
    """Let the first process write tensors that lie in parts: it asks for one at a time, and the others send their parts of it.

    In its host memory the first process has one whole tensor beside its parts, the others have none.

    Args:
        write: called by the first process with a function that gives a tensor (of `tensors`, or any that is whole) whole.
        tensors: the same in every process.

    Raises:
        UserError: the first process's, on all; also for a disk that is full or not writable.
    """
    parts, done = [tensor for tensor in tensors if is_sharded(tensor)], -1

    def ask(tensor: Any) -> Tensor:
        if not is_sharded(tensor):
            return cast(Tensor, tensor)
        agreed(next(number for number, part in enumerate(parts) if part is tensor))
        return _received(tensor.detach())

    def work() -> None:
        try:
            write(ask)
        except (OSError, UserError):  # what `by_the_first` tells the others; anything else ends this process
            agreed(done)
            raise
        agreed(done)

    if not is_first():
        while (number := agreed(done)) != done:
            _send(parts[number].detach())
    by_the_first(work)


def _holders(tensor: Any) -> list[int]:
    """The processes that have the parts of the first copy of a tensor, in the order of its rows."""
    assert tensor.placements[-1].is_shard(0), "as `fully_shard` does it"
    mesh = tensor.device_mesh
    return cast(list[int], mesh.mesh.view(-1, mesh.size(-1))[0].tolist())


def _send(tensor: Any) -> None:
    own = tensor.to_local().cpu()
    if own.numel() and rank() in _holders(tensor):
        send_to_the_first(own.contiguous())


def _received(tensor: Any) -> Tensor:
    """Put together in host memory without the further copies that `full_tensor` makes."""
    holders, found = _holders(tensor), torch.empty(tensor.shape, dtype=tensor.dtype)
    for part, holder in zip(found.chunk(len(holders)), holders, strict=False):  # fewer where there are fewer rows
        if holder == rank():
            part.copy_(tensor.to_local())
        elif part.numel():
            receive(part, holder)
    return found


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Norm of all gradients together, sharded or whole; torch's own cannot mix them."""
    norms: list[Tensor] = []
    for kind in (False, True):
        some = [gradient for gradient in gradients if is_sharded(gradient) == kind]
        if some:
            norms.append(whole(nn.utils.get_total_norm(some)))
    return norms[0] if len(norms) == 1 else torch.stack(norms or [torch.zeros(())]).norm()
