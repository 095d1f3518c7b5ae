"""What the ranks of a run say to one another. Every function is a collective: all ranks call it, in the same order."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def number_of_ranks() -> int:
    """1 without a process group; not a collective."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rank() -> int:
    """0 without a process group; not a collective."""
    return dist.get_rank() if number_of_ranks() > 1 else 0


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if number_of_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value) -> list:
    """Each rank's value, in the order of ranks."""
    if number_of_ranks() == 1:
        return [value]
    found: list = [None] * number_of_ranks()
    dist.all_gather_object(found, value)
    return found
