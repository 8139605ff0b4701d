"""Rank and world: the only place that asks torch.distributed, so that one process is the same code as many."""

import torch.distributed as dist


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_batch(batch_size: int) -> tuple[int, int]:
    """(first, size) of this process's slice of a global batch.

    Raises:
        ValueError: the batch does not divide by the number of processes.
    """
    processes = world_size()
    if batch_size % processes:
        raise ValueError(f"training.batch_size={batch_size} does not divide by {processes} processes")
    size = batch_size // processes
    return rank() * size, size
