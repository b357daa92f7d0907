"""Training steps through torch.compile (`trainer.compile=true`).

Operators are part of the graph: their modes are guards, their masks and fraction bits are buffers that change in place.
A graph therefore holds from one schedule event to the next, and the first event of each kind makes a new one. Steps
that collect, smaller last batches and evaluation run eagerly: they are few, and each would need a graph of its own.

A compiler adds sums in an order of its own, as does another layout of the weights (`trainer.channels_last`). Results
then differ in their last bits: both keys are part of a run's signature.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._functorch.config
import torch.compiler.config
from torch import nn

from qprune.compression.schedule import Timeline
from qprune.training.task import Task

BACKEND = "inductor"
# One graph per combination of active operators. Torch's default is 8 recompilations, and then it silently goes eager.
_GRAPHS = 64
_CPU_OPTIONS = {
    # Backward passes, too, compute in channels last. Otherwise a gradient is laid out by the strides of its weight's,
    # which for one input channel per group say nothing, and is copied twice: 14 % of a step of MobileNetV2.
    "force_layout_optimization": True,
    "cpp.use_decompose_tanh": True,  # by way of the exponential: half the time of the library's tanh
}


class CompiledSteps:
    """A network whose calls are compiled, and the context of each of its steps."""

    def __init__(self, network: nn.Module, timeline: Timeline, device: torch.device) -> None:
        self.timeline, self.device = timeline, device
        self.seconds = 0.0  # of the steps in which something was compiled; they are not counted as training
        self._seen: set[tuple[bool, bool, bool]] = set()
        self._compiling = False
        compile_network(network, device)

    def step(self, step: int) -> AbstractContextManager[object]:
        """Return the context of a training step: compiled where `is_compiled`, else eager."""
        if not is_compiled(self.timeline, step):
            return eager()
        modes = active_modes(self.timeline, step)
        self._compiling = modes not in self._seen
        self._seen.add(modes)
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # results of the step before may be overwritten
        return nullcontext()

    def training_seconds(self, seconds: float) -> float:
        """Return how much of the last step's `seconds` was training: none if it compiled."""
        if not self._compiling:
            return seconds
        self.seconds, self._compiling = self.seconds + seconds, False
        return 0.0


def compile_network(network: nn.Module, device: torch.device) -> None:
    """Have calls of `network`, its own hooks included, compiled for `device`."""
    torch.compiler.config.recompile_limit = _GRAPHS
    # The one flag without a public name: compiled graphs are kept on disk for the next process only if they hold no
    # autograd.Function, and every operator is one. https://github.com/pytorch/pytorch/pull/149751
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    # Small steps on a GPU are bound by kernel launches: replay them as CUDA graphs. Torch takes a mode or options.
    how: dict[str, Any] = {"mode": "reduce-overhead"} if device.type == "cuda" else {"options": _CPU_OPTIONS}
    network.compile(backend=BACKEND, dynamic=False, **how)


def eager() -> AbstractContextManager[object]:
    """Return a context in which compiled networks run eagerly."""
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def is_compiled(timeline: Timeline, step: int) -> bool:
    """Return whether `step` runs compiled: a whole batch, and nothing is collected."""
    return (
        timeline.samples_at(step) == timeline.batch_size
        and timeline.prune_window(step) is None
        and timeline.quantize_window(step) is None
    )


def active_modes(timeline: Timeline, step: int) -> tuple[bool, bool, bool]:
    """Return whether masks, quantized weights and features are active at `step`."""
    return (
        timeline.prune_events(step) > 0,
        timeline.weight_step is not None and step >= timeline.weight_step,
        timeline.feature_step is not None and step >= timeline.feature_step,
    )


def fuse(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Have the optimizers that can update all parameters in one kernel do so."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "fused" in group:
                group["fused"], group["foreach"] = True, False


def arrange(task: Task, channels_last: bool | None, compiled: bool, device: torch.device) -> None:
    """Lay out the weights (O, I, h, w) of a task with channels last, or first (False).

    None: as the task has them, but channels last for steps that are compiled for a CPU, where inductor chooses that for
    convolutions anyway: masks, which are attached later, then have the strides of their features.
    """
    if channels_last is None:
        if not compiled or device.type != "cpu":
            return
        channels_last = True
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for weight in task.parameters():
        if weight.dim() == 4:
            weight.data = weight.data.to(memory_format=memory_format)
