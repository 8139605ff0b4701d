"""Many processes: the only place that asks torch.distributed, so that one process is the same code as many.

    torchrun --nproc-per-node 8 -m fewstep train RECIPE

Processes are started and restarted by torchrun, which tells them about each other in the environment. What they decide
together they decide over a group on the host (gloo), what networks exchange goes over the devices' own (NCCL on GPUs).
"""

import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.errors import UserError, first_line

T = TypeVar("T")
PATIENCE = "FEWSTEP_WAIT_SECONDS"  # environment: how long a process waits for another before it gives up
_PATIENCE_SECONDS = 1800
_FIRST_SPEAKS_SECONDS = 5  # how long others wait to hear that the first process fails in the same way


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks, also before and after there is a process group."""
    grouped = dist.is_available() and dist.is_initialized()
    return (dist.get_rank() if grouped else int(os.environ.get("RANK", "0"))) == 0


def local_batch(batch_size: int) -> tuple[int, int]:
    """(first, size) of this process's slice of a global batch.

    Raises:
        UserError: the batch does not divide by the number of processes.
    """
    processes = world_size()
    if batch_size % processes:
        raise UserError(
            f"training.batch_size={batch_size} does not divide by {processes} processes; start another number of them or "
            "change the batch"
        )
    size = batch_size // processes
    return rank() * size, size


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the processes that torchrun started, for as long as the block lasts; nothing where there is one process.

    Inside, only the first process is heard. A process that fails in the way the first one does ends without a word;
    any other names itself.

    Args:
        device: as `compute.device` has it; "auto" and "cuda" are this process's own GPU.

    Raises:
        UserError: more processes than GPUs, or a process that does not come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    own_gpu(device)
    store = _start(device)
    try:
        with ExitStack() as quiet:
            if not is_first():
                nowhere = quiet.enter_context(open(os.devnull, "w", encoding="utf-8"))
                quiet.enter_context(redirect_stdout(nowhere))
                quiet.enter_context(redirect_stderr(nowhere))
            yield
            dist.barrier()
    except RuntimeError as error:  # of gloo and NCCL
        raise _named(UserError(_lost(error, store)), store) from error
    except UserError as error:
        raise _named(error, store) from error
    finally:
        dist.destroy_process_group()


def own_gpu(device: str) -> None:
    """Work on the GPU of this process's number on its machine.

    Raises:
        UserError: there is none; NCCL needs one for each process.
    """
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not count):
        return
    if device not in ("auto", "cuda"):
        raise UserError(
            f"compute.device={device!r} under torchrun: each process has a device of its own; use auto, cuda or cpu"
        )
    if local >= count:
        raise UserError(
            f"torchrun started process {local + 1} of this machine, which has {count} GPUs that CUDA can use; start with "
            "--nproc-per-node of that number, or set compute.device=cpu"
        )
    torch.cuda.set_device(local)


def _patience() -> timedelta:
    return timedelta(seconds=float(os.environ.get(PATIENCE, _PATIENCE_SECONDS)))


def _start(device: str) -> Any:
    """The process group; returns the store through which processes that fail are heard."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    waits = _patience()
    try:
        agents, number, count = next(dist.rendezvous("env://", timeout=waits))
        store = dist.PrefixStore(_attempt(agents, number, count, waits), agents)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=number,
            world_size=count, timeout=waits,
        )  # fmt: skip
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} cannot reach the others at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} ({first_line(error)})"
        ) from error
    return store


def _attempt(store: Any, number: int, count: int, waits: timedelta) -> str:
    """A name for this start of all processes together, from the first one.

    torchrun's store outlives a restart, and processes that found each other's addresses of the start before would wait for
    the dead. So each says a word of its own, the first repeats all words with the name, and who hears his own answers.

    Raises:
        UserError: some do not come in time; names them.
    """
    word, until = uuid4().hex, time.monotonic() + waits.total_seconds()
    store.set(f"hello {number}", word)
    while time.monotonic() < until:
        if number == 0:
            here = [other for other in range(count) if store.check([f"hello {other}"])]
            store.set("go", json.dumps([word, *(store.get(f"hello {other}").decode() for other in here)]))
            if all(store.check([f"{word} {other}"]) for other in range(1, count)):
                return word
        elif store.check(["go"]):
            name, *words = json.loads(store.get("go"))
            if word in words:
                store.set(f"{name} {number}", "here")
                return str(name)
        time.sleep(0.02)
    late = [other for other in range(1, count) if number == 0 and not store.check([f"{word} {other}"])]
    raise UserError(
        f"process {number} waited {waits.total_seconds():.0f} s in vain for process {', '.join(map(str, late)) or '0'} to start"
    )


def _named(error: UserError, store: Any) -> BaseException:
    """What a process ends with: its error, or silence where the first process says the same."""
    if is_first():
        store.set("failed", str(error))
        return error
    try:
        store.wait(["failed"], timedelta(seconds=_FIRST_SPEAKS_SECONDS))
        same = store.get("failed").decode() == str(error)
    except RuntimeError:
        same = False
    return SystemExit(2) if same else UserError(f"process {rank()}: {error}")


def _lost(error: RuntimeError, store: Any) -> str:
    """What a failed exchange means, in a sentence; other faults are raised as they are."""
    words = re.sub(r"^\[[^]]*\] ", "", (str(error).splitlines() or [""])[0])  # without the line of gloo's source
    words = words.partition(". This is typically")[0][:300]
    signs = ("peer", "timed out", "timeout", "monitoredbarrier", "nccl", "gloo", "socket", "connection")
    if not any(sign in words.lower() for sign in signs):
        raise error
    silent = _silent(store)
    if silent:
        words = f"process {', '.join(map(str, silent))} does not answer: {words}"
    return f"the processes lost each other ({words}); repeat the command, or let torchrun --max-restarts do it"


def _silent(store: Any) -> list[int]:
    """The processes that do not say within seconds that they noticed a failed exchange, too: dead ones, and those waited for."""
    until, silent = time.monotonic() + _FIRST_SPEAKS_SECONDS, list(range(world_size()))
    try:
        store.set(f"noticed {rank()}", "")
        while silent and time.monotonic() < until:
            silent = [number for number in silent if not store.check([f"noticed {number}"])]
            time.sleep(0.02)
    except RuntimeError:  # the store went with the process that had it
        return []
    return silent


def wait_for_all(what: str) -> None:
    """Wait until every process is here.

    Raises:
        UserError: one does not come in time; names it.
    """
    if world_size() == 1:
        return
    try:
        dist.monitored_barrier(timeout=_patience(), wait_all_ranks=True)
    except RuntimeError as error:
        raise UserError(f"waited in vain before {what}: {first_line(error)}") from error


def exchange_seconds(num_values: int, device: torch.device) -> float:
    """Seconds that a sum of float32 values (num_values,) over all processes takes, once all are here.

    Raises:
        UserError: a process does not come, or the sum does not end or is wrong; names it.
    """
    wait_for_all("an exchange")
    values = torch.full((num_values,), 1.0 + rank(), device=device)
    begun, limit = time.perf_counter(), _patience().total_seconds() / 2  # before NCCL's own watch ends the process
    work = dist.all_reduce(values, async_op=True)
    while not work.is_completed() and time.perf_counter() - begun < limit:
        time.sleep(0.0005)
    ended, seconds = work.is_completed(), time.perf_counter() - begun
    if ended:
        work.wait()
    wait_for_all("the end of an exchange was told")
    expected = world_size() * (world_size() + 1) / 2
    states = gathered(
        ""
        if ended and bool((values == expected).all())
        else "is wrong"
        if ended
        else f"has not ended after {limit:.0f} s"
    )
    faults = [f"on process {number} {state}" for number, state in enumerate(states) if state]
    if faults:
        raise UserError(f"a sum over all processes {' and '.join(faults)}; look at the network between their machines")
    return seconds


def group_apart() -> Any:
    """A group on the host of all processes for what goes on beside training; None for one process."""
    return dist.new_group(backend="gloo", timeout=_patience()) if world_size() > 1 else None


def agreed(value: T, group: Any = None) -> T:
    """The first process's value, on all."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    return box[0]


def gathered(value: T, group: Any = None) -> list[T]:
    """Every process's value, in their order."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, group)
    return found


def send_to_the_first(part: Tensor) -> None:
    """Send a tensor in host memory, which the first process receives at the same time."""
    dist.send(part, 0)


def receive(part: Tensor, sender: int) -> None:
    """Fill a tensor in host memory with what a process sends to the first one, which this is."""
    dist.recv(part, sender)


def received_by_the_first(value: T) -> list[T]:
    """Every process's value in their order on the first process, nothing on the others; as `gathered`."""
    found: list[Any] | None = [None] * world_size() if is_first() else None
    dist.gather_object(value, found, dst=0)
    return found or []


def mean(values: Tensor) -> Tensor:
    """Mean over the processes of a tensor that each has, in place where there are several."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def average_gradients(gradients: Iterable[Tensor]) -> None:
    """Replace gradients of replicated parameters by their mean over the processes, in one exchange for each precision."""
    if world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for group in by_dtype.values():
        flat = mean(torch.cat([gradient.flatten() for gradient in group]))
        pieces = flat.split([gradient.numel() for gradient in group])
        torch._foreach_copy_(group, [piece.view_as(gradient) for piece, gradient in zip(pieces, group, strict=True)])
