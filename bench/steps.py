"""Build one training step: of the float network, with qprune's operators, or with those of a peer."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.nn.utils import parametrize

from qprune import Compressor, Plan, PruneConfig, QuantizeConfig, Timeline, attach
from qprune.compression import native
from qprune.tasks.cifar import Cifar
from qprune.tasks.espcn import Espcn
from qprune.training.compile import compile_network, fuse
from qprune.training.task import DataOptions, Limits, Task

Step = Callable[[], None]
Context = Callable[[], AbstractContextManager[object]]
CONFIGS = Path(__file__).parents[1] / "configs"
TASKS: dict[str, type[Task]] = {"cifar": Cifar, "espcn": Espcn}
NEVER = 10**9
SETTLING, WINDOW = 5, 8  # steps before all are alike; steps of an observation
# Mode -> when things happen, in steps.
MODES: dict[str, dict[str, Any]] = {
    "idle": {"prune_steps": (NEVER,), "weight_step": NEVER, "feature_step": NEVER},
    "observing masks": {"prune_steps": (WINDOW,), "window": WINDOW},
    "observing fraction bits": {"weight_step": WINDOW, "feature_step": WINDOW, "window": WINDOW},
    "active": {"prune_steps": (1,), "weight_step": 2, "feature_step": 2},
}


def make_task(name: str, device: str = "cpu") -> Task:
    """Build a task on synthetic data, with the paper's sizes."""
    torch.manual_seed(0)
    return TASKS[name](data=DataOptions("synthetic"), limits=Limits(epochs=200), seed=0).to(torch.device(device))


def make_plan(name: str, network: nn.Module) -> Plan:
    """Find the sites of a task's recipe."""
    return Plan.from_globs(network, **read_config(f"task/{name}")["task"]["sites"])


def read_config(name: str) -> dict[str, Any]:
    """Read a file of configs/."""
    found: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


def ours(name: str, mode: str = "active", how: str = "eager", device: str = "cpu", precision: str = "float32") -> Step:
    """Build a step with qprune's operators, or of the float network.

    mode: a key of `MODES`, or `float`. how: `eager`, `no compiler` (without the native operator) or `compiled`.
    precision: the dtype of autocast.
    """
    task = make_task(name, device)
    compressor = None
    if mode != "float":
        size = task.train_batches.batch_size
        times = MODES[mode] | {"window": size * MODES[mode].get("window", 1)}
        timeline = Timeline(steps_per_epoch=NEVER, batch_size=size, last_batch_size=size, **times)
        plan = make_plan(name, task.network)
        compressor = attach(task.network, plan, timeline, task.example, PruneConfig(), QuantizeConfig())
        task.to(torch.device(device))
    optimizers = task.optimizers()
    if how == "compiled":
        fuse(optimizers.values())
        compile_network(task.network, torch.device(device))
    context: Context = native.disabled if how == "no compiler" else contextlib.nullcontext
    if precision != "float32":
        context = lambda: torch.autocast(device, dtype=getattr(torch, precision))  # noqa: E731
    return _settled(task, compressor, context)


def _settled(task: Task, compressor: Compressor | None = None, context: Context = contextlib.nullcontext) -> Step:
    """Return the task's step on one batch, after the steps in which the operators change."""
    task.begin_epoch(0)
    batch = next(task.train_batches.epoch(0))
    task.train()

    def step() -> None:
        with context():
            task.train_step(batch)

    with torch.compiler.set_stance("force_eager"):  # one graph is compiled, that of the settled step
        for number in range(SETTLING):
            if compressor is not None:
                compressor.at(number)
            step()
    step()
    return step


def qsparse(name: str) -> Step:
    """Build a step with the operators of qsparse 2.0.1, which refuses channels last."""
    task = make_task(name)
    task.network.to(memory_format=torch.contiguous_format)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line per operator
        attach_qsparse(task.network, name)
        task.optimizers()
        return _settled(task)


def attach_qsparse(network: nn.Module, name: str, prune_at: int = 1, weights_at: int = 2, features_at: int = 2) -> None:
    """Attach qsparse's operators where the recipe has qprune's; masks change once, at step `prune_at`."""
    import qsparse

    logging.disable(logging.CRITICAL)
    qsparse.set_qsparse_options(log_on_created=False, log_during_train=False)

    def pruning(dimensions: set[int], average: bool) -> Any:
        options = {"mask_refresh_interval": 1, "stop_mask_refresh": 2, "running_average": average}
        callback = qsparse.MagnitudePruningCallback(**options)
        times = {"start": prune_at, "interval": 1, "repetition": 1}
        return qsparse.prune(sparsity=0.5, dimensions=dimensions, callback=callback, **times)

    def quantizing(channelwise: int, at: int) -> Any:
        return qsparse.quantize(bits=8, channelwise=channelwise, timeout=at, callback=qsparse.DecimalQuantizer())

    cifar = name == "cifar"
    only = {"log": False} if cifar else {"log": False, "include": "conv2"}
    pruned, quantized = ([nn.BatchNorm2d], [nn.BatchNorm2d]) if cifar else ([nn.Conv2d], [nn.Tanh])
    qsparse.convert(network, pruning({0, 1, 2, 3}, False), weight_layers=[nn.Conv2d], **only)
    qsparse.convert(network, quantizing(1, weights_at), weight_layers=[nn.Conv2d, nn.Linear], log=False)
    qsparse.convert(network, pruning({1, 2, 3}, True), activation_layers=pruned, **only)
    qsparse.convert(network, quantizing(-1, features_at), activation_layers=quantized, log=False)


def torch_ao(name: str) -> Step:
    """Build a step with torch's fake quantization, without pruning, at the sites that the recipe quantizes."""
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, disable_observer

    task = make_task(name)
    for site in make_plan(name, task.network).active:
        if not site.quantize:
            continue
        fake = FakeQuantize(MovingAverageMinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8)
        module = task.network if site.path == "input" else task.network.get_submodule(site.path)
        if site.kind == "weight":
            parametrize.register_parametrization(module, "weight", fake)
            continue
        module.add_module("fake", fake)
        if site.path == "input":
            module.register_forward_pre_hook(lambda module, args: (module.fake(args[0]), *args[1:]))
        else:
            module.register_forward_hook(lambda module, args, output: module.fake(output))
    task.optimizers()
    step = _settled(task)
    task.network.apply(disable_observer)
    return step
