"""Training steps to measure: a task's own step, on its float network, ours, or one with a peer's operators."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from qprune.compression.compressor import Compressor, attach
from qprune.compression.plan import Plan
from qprune.compression.rectified import find_rectified
from qprune.compression.schedule import Timeline
from qprune.config.build import Recipe
from qprune.config.compose import compose_run
from qprune.training.compile import as_written, compile_training
from qprune.training.layout import arrange
from qprune.training.optimizers import shorten_steps
from qprune.training.setup import build_task, plan_of
from qprune.training.task import Task

NEVER = 10**9
CPU = torch.device("cpu")
LAYOUTS = {"own": None, "contiguous": False, "channels last": True}  # as `trainer.channels_last` says it


def task_of(name: str, *overrides: str) -> tuple[Recipe, Task]:
    """The task of a run on synthetic data, made as `qprune run` makes it."""
    recipe = Recipe.from_config(compose_run((f"task={name}", "order=prune_first", "data=synthetic", *overrides)))
    torch.manual_seed(0)
    return recipe, build_task(recipe)


def timeline(mode: str, batch: int, window: int) -> Timeline:
    """A timeline on which steps from 2 on are all in one mode: float, idle, masks, decimals, active or prune."""
    kinds: dict[str, dict[str, Any]] = {
        "idle": {"prune_steps": (NEVER,), "weight_step": NEVER, "feature_step": NEVER, "window": batch},
        "masks": {"prune_steps": (NEVER // 10,), "window": NEVER * batch},
        "decimals": {"weight_step": window // batch, "feature_step": window // batch, "window": window},
        "prune": {"prune_steps": (1,), "window": batch},
        "active": {"prune_steps": (1,), "weight_step": 2, "feature_step": 2, "window": batch},
    }
    return Timeline(steps_per_epoch=NEVER, batch_size=batch, last_batch_size=batch, **kinds[mode])


def with_operators(recipe: Recipe, task: Task, times: Timeline) -> Compressor:
    """The recipe's operators on the task's network."""
    return attach(task.network, plan_of(recipe, task), times, task.example, recipe.pruning, recipe.quantization)


def ours(name: str, mode: str = "active", layout: str = "own", way: str = "eager", batch: int = 0) -> Callable[[], Any]:
    """One step of the task with our operators in `mode`, or the float network (`float`).

    layout: `own` (what the task or the way has), `contiguous` or `channels last`. way: `eager`, `ordinary` (eager, with
    the optimizer as torch has it by default), `plain` (torch's functions alone), `compiled`, `torch.compile` (with its
    defaults) or `packed`. batch: samples per step if not the recipe's.
    """
    recipe, task = task_of(name, *([f"task.batch_size={batch}"] if batch else []))
    arrange(task, LAYOUTS[layout], way == "compiled", CPU)
    size = task.train_batches.batch_size
    compressor = None if mode == "float" else with_operators(recipe, task, timeline(mode, size, 16 * size))
    # The steps before those that are measured; in the window of decimals those before it ends.
    last = {"float": 1, "idle": 1, "decimals": 8}.get(mode, 3)
    return _step(task, compressor, way, last)


def _step(task: Task, compressor: Compressor | None, way: str, last: int) -> Callable[[], Any]:
    from qprune.compression import native as kernels

    optimizers = task.optimizers()
    context: Callable[[], Any] = contextlib.nullcontext
    if way == "compiled":
        compile_training(task, optimizers, CPU)
    elif way == "torch.compile":
        task.network.compile()
    elif way == "ordinary":
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["fused"] = None
    elif way == "plain":
        context = kernels.unused
    elif compressor is not None:
        # as `qprune run` takes a step where there is a C compiler
        context = partial(as_written, find_rectified(task.network, task.example), way == "packed")
    if way != "ordinary":
        shorten_steps(optimizers)  # float steps too: what operators cost is compared, not what an optimizer does
    task.begin_epoch(0)
    batches = task.train_batches.epoch(0)
    batch, count = next(batches), 0
    task.train()

    def step() -> None:
        nonlocal count
        with context():
            if compressor is not None and count <= last:
                compressor.at(count)
            count += 1
            task.train_step(batch)

    for _ in range(last + 1):
        step()
    return step


def qsparse_on(task: Task, name: str, prune_at: int = 1, quantize_at: int = 2, weights_at: int = 2) -> None:
    """qsparse 2.0.1's operators on the task's network, at the steps given; masks are fixed after the first."""
    import qsparse

    logging.disable(logging.CRITICAL)
    sys.stdout = io.StringIO()  # it prints a line for every operator; this process is the contenders' own
    qsparse.set_qsparse_options(log_on_created=False, log_during_train=False)
    network = task.network
    cifar = name == "cifar"

    def pruning(dimensions: set[int], average: bool) -> Any:
        callback = qsparse.MagnitudePruningCallback(
            mask_refresh_interval=1, stop_mask_refresh=2, running_average=average
        )
        times = {"start": prune_at, "interval": 1, "repetition": 1}
        return qsparse.prune(sparsity=0.5, dimensions=dimensions, callback=callback, **times)

    def quantizing(channelwise: int, at: int) -> Any:
        return qsparse.quantize(bits=8, channelwise=channelwise, timeout=at, callback=qsparse.DecimalQuantizer())

    layers = [nn.Conv2d, nn.Linear] if cifar else [nn.Conv2d]
    only: dict[str, Any] = {} if cifar else {"include": "conv2"}
    kinds: dict[str, Any] = {"log": False}
    everything, sample = {0, 1, 2, 3}, {1, 2, 3}
    qsparse.convert(network, pruning(everything, False), weight_layers=[nn.Conv2d], **only, **kinds)
    qsparse.convert(network, quantizing(1, weights_at), weight_layers=layers, **kinds)
    makers = [nn.BatchNorm2d] if cifar else [nn.Conv2d]
    qsparse.convert(network, pruning(sample, True), activation_layers=makers, **only, **kinds)
    qsparse.convert(network, quantizing(-1, quantize_at), activation_layers=makers if cifar else [nn.Tanh], **kinds)


def qsparse_step(name: str, layout: str, way: str = "eager") -> Callable[[], Any]:
    """One step with qsparse's pruning and quantization of weights and features; way: `eager` or `ordinary`."""
    _, task = task_of(name)
    arrange(task, LAYOUTS[layout], compiled=False, device=CPU)
    qsparse_on(task, name)
    return _step(task, None, way, 4)


class _Fake(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

        self.fake = FakeQuantize(MovingAverageMinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fake(x)
        return out


def torch_step(name: str, layout: str, way: str = "eager") -> Callable[[], Any]:
    """One step with torch's fake quantization (no pruning) of the weights and features that ours quantizes.

    way: `eager` or `ordinary`.
    """
    recipe, task = task_of(name)
    arrange(task, LAYOUTS[layout], compiled=False, device=CPU)
    plan: Plan = plan_of(recipe, task)
    fakes: list[Any] = []
    for site in plan.active:
        if not site.quantize:
            continue
        fake = _Fake()
        fakes.append(fake.fake)
        if site.kind == "weight":
            parametrize.register_parametrization(task.network.get_submodule(site.path), "weight", fake)
        elif site.path == "input":
            task.network.register_forward_pre_hook(lambda module, args, fake=fake: (fake(args[0]), *args[1:]))
        else:
            module = task.network.get_submodule(site.path)
            module.register_forward_hook(lambda module, args, output, fake=fake: fake(output))
    step = _step(task, None, way, 1)
    for fake in fakes:
        fake.disable_observer()
    return step
