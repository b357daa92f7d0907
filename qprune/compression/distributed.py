"""Sums and windows over all ranks; in a single process, each function returns its input."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


_batch_share: float | None = None


def set_batch_share(share: float) -> None:
    """Set the fraction of the current batch's samples on this rank; the default is an equal share."""
    global _batch_share  # one batch at a time is trained on in a process
    _batch_share = share


def batch_share() -> float:
    """Return the fraction of the current batch's samples on this rank, the weight of its mean over the batch."""
    world = rank_and_world()[1]
    return 1.0 if world == 1 else _batch_share or 1 / world


def of_whole_batch(grad: Tensor, of_samples: bool) -> Tensor:
    """Return the gradient of the whole batch's mean loss, from that of the mean over this rank's samples.

    of_samples: whether it belongs to a feature, whose samples this rank alone has, or to a weight, to whose gradient
    every rank contributes (then all ranks must call this, in the same order).
    """
    if rank_and_world()[1] == 1:
        return grad
    own = grad * batch_share()
    return own if of_samples else summed(own)


def summed(x: Tensor) -> Tensor:
    """Return the sum of x over the ranks, the same bits on each."""
    if rank_and_world()[1] == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total


def largest_of_ranks(x: Tensor) -> Tensor:
    """Return the elementwise maximum of x over the ranks."""
    if rank_and_world()[1] == 1:
        return x
    largest = x.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def gathered(x: Tensor) -> Tensor:
    """Return the flat x of every rank, concatenated in rank order; the ranks' sizes may differ."""
    world = rank_and_world()[1]
    if world == 1:
        return x
    sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([x.numel()], device=x.device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=x.dtype, device=x.device)
    padded[: x.numel()] = x
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])
