"""Devices and ranks: choosing a device, launching processes, one share of a batch each, gradients averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from qprune.compression.ranks import rank_and_world
from qprune.errors import UserError, one_of

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`; UserError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    one_of("trainer.device", name.partition(":")[0], ("cpu", "cuda"))
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.device={name} but torch sees no CUDA device; type trainer.device=cpu or auto")
    if name == "cuda":
        name = f"cuda:{local_rank % torch.cuda.device_count()}"
    return torch.device(name)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a precision; operators compute in float32 inside it all the same."""
    one_of("trainer.precision", precision, PRECISIONS)
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def launch(ranks: int, work: Callable[..., Any], *args: Any) -> Any:
    """Run `work(*args)` in `ranks` processes of one group and return rank 0's result; in this process when 1.

    torch's elastic agent starts them, so that a rank that dies ends the others instead of hanging them.
    """
    if ranks < 1:
        raise UserError(f"trainer.ranks={ranks} is not a number of processes; type a whole number >= 1")
    if ranks == 1:
        return work(*args)
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="spawn",
        monitor_interval=1,
    )
    return elastic_launch(config, _in_group)(work, args)[0]


def _in_group(work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        return work(*args)
    finally:
        dist.destroy_process_group()


def share_of(batch: Any) -> tuple[Any, float]:
    """This rank's samples of a batch (any nesting of tensors, samples first) and their fraction of the whole."""
    rank, world = rank_and_world()
    if world == 1:
        return batch, 1.0
    sizes: list[int] = []

    def cut(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            return tensor
        local = -(-tensor.shape[0] // world)
        part = tensor[rank * local : (rank + 1) * local]
        sizes.append(part.shape[0])
        if part.shape[0] == 0:
            raise UserError(f"a batch of {tensor.shape[0]} samples leaves rank {rank} of {world} without any")
        whole.append(tensor.shape[0])
        return part

    whole: list[int] = []
    part = tree_map(cut, batch)
    return part, sizes[0] / whole[0]


def average_gradients(optimizers: Iterable[torch.optim.Optimizer], weight: Callable[[], float]) -> None:
    """Have every optimizer step on the gradient of the whole batch: the ranks' gradients, weighted by their shares.

    A hook on the optimizers rather than a wrapper around networks: names and deep copies stay as they are, and any
    number of networks, calls and backward passes between two steps works.
    """
    if rank_and_world()[1] == 1:
        return

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients]).mul_(weight())
        dist.all_reduce(flat)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(hook)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds on any rank; every rank gets the same answer."""
    if rank_and_world()[1] == 1:
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)
