"""Devices and ranks: launch processes, share batches out, average gradients."""

import itertools
import json
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils._pytree import tree_map

from qprune.compression.distributed import batch_share, rank_and_world, summed
from qprune.compression.operator import Operator
from qprune.errors import DEBUG_VARIABLE, Interrupted, RunFailure, StoppedEarly, UserError, one_of

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device for auto, cpu, cuda or cuda:N; UserError if it is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    one_of("trainer.device", name.partition(":")[0], ("auto", "cpu", "cuda"))
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.device={name} but torch sees no CUDA device; type trainer.device=cpu or auto")
    if name == "cuda":
        name = f"cuda:{local_rank % torch.cuda.device_count()}"
    return torch.device(name)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the autocast context of a precision; operators still compute in float32."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def launch(ranks: int, work: Callable[..., Any], *args: Any) -> Any:
    """Run `work(*args)` in `ranks` processes (1: in this) and return rank 0's result.

    torch's elastic agent starts them, so that a rank that dies ends the others instead of hanging them.
    """
    if ranks == 1:
        return work(*args)
    # The agent's handlers for these stay after it. What the shell has set to be ignored, as by nohup, stays ignored.
    stopping = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: handler for number in stopping if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="spawn",
        monitor_interval=1,
        max_restarts=0,  # a rank that failed would fail again; the run itself is what resumes
        run_id="qprune",
        signals_to_handle=",".join(number.name for number in before),
    )
    _quiet_agent()
    with tempfile.TemporaryDirectory() as reports, ExitStack() as handlers:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                handlers.callback(signal.signal, number, handler)
        try:
            return elastic_launch(config, _in_group)(reports, work, args)[0]
        except ChildFailedError as error:
            raise _error_of_ranks(Path(reports)) from error
        except (RendezvousError, dist.DistNetworkError) as error:
            raise RunFailure(
                f"ranks cannot reach each other through localhost ({' '.join(str(error).split())[:200]}); bring its "
                "network up, or type trainer.ranks=1"
            ) from error
        except SignalException as error:
            raise Interrupted(
                f"stopped by {error.sigval.name}, with the ranks' work saved; the same command goes on from there"
            ) from error


def _error_of_ranks(reports: Path) -> Exception:
    """Return the error of the ranks that failed, as it would be without ranks.

    When one rank ends, the others fail in their communication with it: errors for the user take precedence.
    """
    failed = [json.loads(report.read_text()) for report in sorted(reports.iterdir())]
    for kind, report in itertools.product((UserError, RunFailure, StoppedEarly, Interrupted), failed):
        if report["kind"] == kind.__name__:
            return kind(report["message"])
    last = "; ".join(f"rank {report['rank']} last said {report['kind']}: {report['message']}" for report in failed)
    return RunFailure(f"a rank died, and the others were stopped{': ' if last else ''}{last}")


def _quiet_agent() -> None:
    """Silence the agent's tracebacks, which `_error_of_ranks` makes one paragraph."""
    if os.environ.get(DEBUG_VARIABLE) != "1":
        for name in ("torch.distributed.elastic", "torch.multiprocessing"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _in_group(reports: str, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Run `work` as one rank of a group; one that fails leaves a report."""
    _quiet_agent()
    try:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        result = work(*args)
    except Exception as error:
        # The group is not destroyed: that would wait for ranks that wait for this one.
        report = {"rank": int(os.environ["RANK"]), "kind": type(error).__name__, "message": str(error)}
        (Path(reports) / f"{report['rank']}.json").write_text(json.dumps(report))
        raise
    dist.destroy_process_group()
    return result


def share_of(batch: Any) -> tuple[Any, float]:
    """Return this rank's samples of a batch and their fraction of the whole.

    A batch is any nesting of tensors, samples first, or a list of samples, which may differ in size.
    """
    rank, world = rank_and_world()
    if world == 1:
        return batch, 1.0
    fractions: list[float] = []

    def cut(samples: Any) -> Any:
        local = -(-len(samples) // world)
        part = samples[rank * local : (rank + 1) * local]
        if not len(part):
            raise UserError(f"a batch of {len(samples)} samples leaves rank {rank} of {world} without any")
        fractions.append(len(part) / len(samples))
        return part

    if isinstance(batch, list):
        return cut(batch), fractions[0]
    part = tree_map(lambda leaf: cut(leaf) if isinstance(leaf, Tensor) and leaf.dim() else leaf, batch)
    return part, fractions[0]


def average_gradients(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Have optimizers step on the whole batch's gradient, the ranks' weighted mean.

    A hook rather than a wrapper around networks: names and deep copies stay as they are, and any number of networks and
    backward passes between two steps works.
    """
    if rank_and_world()[1] == 1:
        return

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients]).mul_(batch_share())
        dist.all_reduce(flat)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(hook)


def losses_of_whole_batch(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the losses (0-d) of the whole batch from those of this rank's share."""
    if rank_and_world()[1] == 1:
        return losses
    total = summed(torch.stack(list(losses.values())).mul_(batch_share()))
    return dict(zip(losses, total, strict=True))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` holds on any rank; the same on every rank."""
    if rank_and_world()[1] == 1:
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def take_from_first_rank(network: nn.Module) -> None:
    """Broadcast rank 0's weights and statistics, tensor by tensor in a fixed order.

    Operators are left out: rank 0 alone collects sums meanwhile; masks and fraction bits are equal on all ranks anyway.
    """
    if rank_and_world()[1] == 1:
        return
    for module in network.modules():
        if not isinstance(module, Operator):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                dist.broadcast(tensor.detach(), 0)
