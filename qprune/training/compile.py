"""The training step through torch.compile (`trainer.compile=true`): which steps are compiled, and how.

Operators are part of the graph: their modes are guards, their masks and decimal bits are read from buffers that change
in place. So a graph holds from one schedule event to the next, and the first event of each kind makes a new one.
Steps that collect, a smaller last batch and evaluation run uncompiled: they are few, and would each need a graph.

A compiler orders the sums of convolutions and norms as it likes, so results differ in their last bits from those of an
uncompiled run: the key is part of a run's identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from qprune.compression.compressor import Compressor
from qprune.compression.schedule import Timeline
from qprune.errors import UserError
from qprune.training.optimizers import fuse, shorten_steps
from qprune.training.task import Task

BACKEND = "inductor"
# One graph per combination of operators that are active; torch's default is 8, and then it silently stops compiling.
_GRAPHS = 64
# Torch's names of guards that ask whether the program is still the same.
_OF_THE_PROGRAM = {
    *("BUILTIN_MATCH", "CLASS_MATCH", "CLOSURE_MATCH", "MODULE_MATCH"),
    *("DICT_NOT_CONTAINS", "NOT_PRESENT_IN_GENERIC_DICT"),  # no object's attribute hides a method
}
# Building operators beside a run slows it down meanwhile: one that is soon over is left alone.
SECONDS_BEFORE_BUILDING = 30.0


def compile_training(task: Task, optimizers: Mapping[str, torch.optim.Optimizer], device: torch.device) -> None:
    """Have calls of the task's network compiled, and its optimizers take their step in one pass where they can."""
    torch._dynamo.config.recompile_limit = _GRAPHS
    # Graphs with operators are functions with gradients of their own, which torch keeps for a next run only if told to.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    network, mode = task.network, None
    guards = {"guard_filter_fn": guards_of_a_run}
    options: dict[str, Any] | None = guards
    if BACKEND == "inductor" and device.type == "cuda":
        # Small steps are bound by launches: replay them as CUDA graphs. Torch takes a mode or options, not both.
        mode, options = "reduce-overhead", None
    elif BACKEND == "inductor":
        from qprune.training.inductor import options_on_a_cpu

        options = guards | options_on_a_cpu()

    def call(*args: Any, **kwargs: Any) -> Any:
        return network._call_impl(*args, **kwargs)

    # As `network.compile()` does it, but for the function between: without it, torch passes over the call itself and
    # hooks of the whole network (those of its input) become graphs of their own.
    network._compiled_call_impl = torch.compile(call, backend=BACKEND, dynamic=False, mode=mode, options=options)
    fuse(optimizers)


def guards_of_a_run(guards: Sequence[Any]) -> list[bool]:
    """Which of a compiler's guards are asked before each step: those of what can change while a run trains.

    Values, tensors, lists and torch's own state can. The functions, classes and modules of Python that were
    compiled stay what they are, and asking for each takes a hundredth of a step of ESPCN.
    """
    return [guard.guard_type not in _OF_THE_PROGRAM for guard in guards]


def is_compiled(timeline: Timeline, step: int) -> bool:
    """Whether `step` is run compiled: a whole batch, and nothing is collected."""
    return (
        timeline.samples_at(step) == timeline.batch_size
        and timeline.prune_window(step) is None
        and timeline.quantize_window(step) is None
    )


def state_of(timeline: Timeline, step: int) -> tuple[bool, bool, bool]:
    """What a graph stands for: whether masks, quantized weights and quantized features are active at `step`."""
    return (
        timeline.prune_events(step) > 0,
        timeline.weight_step is not None and step >= timeline.weight_step,
        timeline.feature_step is not None and step >= timeline.feature_step,
    )


class Ways:
    """How steps are carried out: as written, compiled (`compile`), or with packed features (`pack_features`).

    fuse_relu: as written, operators take the ReLU behind them into their passes, where that is sound.
    compile_seconds: what the steps took in which something was compiled; it is no part of the time of training.
    Raises UserError for both at once: a compiled step decides itself what it keeps.
    """

    def __init__(
        self,
        task: Task,
        optimizers: Mapping[str, torch.optim.Optimizer],
        compressor: Compressor,
        device: torch.device,
        compile: bool,  # noqa: A002  (the name of the key)
        pack_features: bool,
        fuse_relu: bool,
    ) -> None:
        if compile and pack_features:
            raise UserError("trainer.compile=true and trainer.pack_features=true exclude each other; choose one")
        self.timeline, self.device, self.compile, self.pack_features = (
            compressor.timeline,
            device,
            compile,
            pack_features,
        )
        self.compile_seconds = 0.0
        self._met: set[tuple[bool, bool, bool]] = set()
        self._compiling = False
        if compile:
            compile_training(task, optimizers, device)
        shorten_steps(optimizers)

    def begin_epoch(self) -> None:
        """Nothing."""

    def of_step(self, step: int) -> AbstractContextManager[object]:
        """The context of a training step."""
        if not self.compile:
            return nullcontext()
        if not is_compiled(self.timeline, step):
            return self.of_evaluation()
        state = state_of(self.timeline, step)
        self._compiling = state not in self._met
        self._met.add(state)
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # results of the step before may be overwritten
        return nullcontext()

    def of_evaluation(self) -> AbstractContextManager[object]:
        """A context in which networks run as they are written."""
        return torch.compiler.set_stance("force_eager") if self.compile else nullcontext()

    def of_training(self, seconds: float) -> float:
        """What of the last step's time was training: nothing when it compiled."""
        if not self._compiling:
            return seconds
        self.compile_seconds, self._compiling = self.compile_seconds + seconds, False
        return 0.0
