"""Trace the feature tensors that a network stores: those that some layer reads, seen by running one example.

Elementwise operations and batch norms are taken to be fused with what makes their input, as inference engines do, so
the sum of a residual block is one stored tensor and its addends are none. A tensor is charged with the bits of the
quantizer whose grid it still lies on: ReLU, max pooling and moving elements about keep the grid, arithmetic leaves it.
It is charged with the mask of the pruner whose zeros it still has: any function with f(0) = 0 keeps those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qprune.compression.config import CONVOLUTIONS
from qprune.compression.operator import Operator
from qprune.compression.prepare import FeatureOperators, run_example
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer

FLOAT_BITS = 32
COMPUTE = (*CONVOLUTIONS, nn.Linear)
ATTENTION = (nn.MultiheadAttention,)
_KEEPS_GRID = ("relu", "relu_", "clamp_min", "hardtanh", "hardtanh_", "max_pool2d_with_indices", "pixel_shuffle", "cat")
# Elementwise with f(0) = 0, in place or not; those above that keep a grid do so too, but for pooling.
_KEEPS_ZEROS = ("tanh", "leaky_relu", "relu", "hardtanh", "gelu", "silu", "elu", "hardswish", "neg", "abs")
# A reflected rim repeats what is there and is made where it is read.
_MOVES = (
    *("clone", "contiguous", "_to_copy", "detach", "native_dropout", "alias", "_unsafe_view"),
    *("reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
)


@dataclass(eq=False)
class Stored:
    """A feature tensor and how it was made.

    Attributes:
        name: The module that made it, or `input`.
        elements, bits, density: Its elements, bits per element and fraction of elements kept.
        operators: `prune` and `quantize`, those whose zeros and grid it has.
        made_by: The function that made it, by torch's name; '' for the network's input.
        within: The module in whose forward it was made.
        fused: Whether that function counts as part of the one that made its input.
        keeps: What a function of one tensor keeps of its input: `grid`, `zeros`.
        inputs: The tensors that it was made from.
        uses: Number of functions that received it.
        outputs: Paths of the modules that returned it, inner ones first, with the shape.
        readers: Paths of the modules in which something reads it.
    """

    name: str
    elements: int
    bits: int = FLOAT_BITS
    density: float = 1.0
    operators: frozenset[str] = frozenset()
    made_by: str = ""
    within: str = ""
    fused: bool = False
    keeps: frozenset[str] = frozenset()
    inputs: tuple[Stored, ...] = ()
    uses: int = 0
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    readers: list[str] = field(default_factory=list)


def uncovered_features(network: nn.Module, example: Any) -> list[Stored]:
    """Return the stored features without mask or grid while every operator of `network` is active."""
    return [stored for stored in with_all_active(network, example).reads if not stored.operators]


def with_all_active(network: nn.Module, example: Any) -> Trace:
    """Trace `example` through `network` with every operator active."""
    operators = [module for module in network.modules() if isinstance(module, Operator)]
    before = [operator.active for operator in operators]
    try:
        for operator in operators:
            operator.active = True
        return traced(network, example)
    finally:
        for operator, active in zip(operators, before, strict=True):
            operator.active = active


def stored_features(network: nn.Module, example: Any) -> list[Stored]:
    """Return the feature tensors that layers of `network` read, each once, in order of first use."""
    return list(traced(network, example).reads)


def traced(network: nn.Module, example: Any) -> Trace:
    """Trace `example` through `network`."""
    trace = Trace()
    handles = [
        hook
        for path, module in network.named_modules()
        for hook in (
            module.register_forward_pre_hook(trace.enter(path)),
            module.register_forward_hook(trace.leave(path, module), always_call=True),
        )
    ]
    try:
        trace.record("input", example)
        tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
        trace.batch = len(tensors[0]) if tensors and tensors[0].dim() else 0
        trace.first = None if isinstance(example, dict) or not tensors else trace.values.get(id(tensors[0]))
        with trace, _attention_by_its_parts():
            output = run_example(network, example)
    finally:
        for handle in handles:
            handle.remove()
    trace.results = {trace.values[id(t)] for t in tree_leaves(output) if id(t) in trace.values}
    for tensor in tree_leaves(output):
        trace.read(tensor, note=False)
    return trace


@contextmanager
def _attention_by_its_parts() -> Iterator[None]:
    """Keep torch from computing attention in evaluation mode as one function that hides the tensors inside."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Trace(TorchDispatchMode):
    """Follows feature tensors through a network.

    Attributes:
        reads: Tensors that something reads, in that order.
        results: Tensors that the network returns.
        calls, given: Number of calls, and shape of the first argument, by module path.
        layers: Paths of convolutions, linear layers and attention in the order of their first call.
        first: The network's first positional argument, if that is a feature.
        batch: Samples of the example.
    """

    def __init__(self) -> None:
        super().__init__()
        self.results: set[Stored] = set()
        self.calls: dict[str, int] = {}
        self.given: dict[str, tuple[int, ...]] = {}
        self.layers: list[str] = []
        self.first: Stored | None = None
        self.batch = 0
        self.values: dict[int, Stored] = {}
        self.alive: list[Tensor] = []  # so that no id is used twice
        self.reads: dict[Stored, None] = {}
        self.path: list[str] = []
        self.muted = 0

    def record(
        self, name: str, tensors: Any, like: Stored | None = None, grid: bool = True, zeros: bool = True, **origin: Any
    ) -> None:
        """Record new feature tensors, with the grid and the zeros of `like` as said; origin: further fields."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.alive.append(tensor)
                stored = Stored(name, tensor.numel(), **origin)
                self.values[id(tensor)] = stored
                if like is not None and grid:
                    stored.bits = like.bits
                if like is not None and zeros:
                    stored.density = like.density
                if like is not None:
                    kept = {"quantize": grid, "prune": zeros}
                    stored.operators = frozenset(name for name in like.operators if kept[name])

    def read(self, tensor: Any, note: bool = True) -> None:
        """Record a read of the tensor by the running module, or by the network's caller (note=False)."""
        if id(tensor) in self.values:
            stored = self.values[id(tensor)]
            self.reads[stored] = None
            if note:
                stored.readers.append(self.path[-1] if self.path else "")

    def enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.path.append(path)
            self.calls[path] = self.calls.get(path, 0) + 1
            self.given[path] = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else ()
            if isinstance(module, COMPUTE + ATTENTION) and path not in self.layers:
                self.layers.append(path)
            self.muted += isinstance(module, (FeatureOperators, Operator))

        return hook

    def leave(self, path: str, module: nn.Module) -> Callable[..., None]:
        if isinstance(module, FeatureOperators):
            operators = [operator for operator in (module.pruner, module.quantizer) if operator is not None]
        else:
            operators = [module] if isinstance(module, (Pruner, Quantizer)) else []

        def hook(_: nn.Module, args: Any, output: Any) -> None:
            self.path.pop()
            self.muted -= isinstance(module, (FeatureOperators, Operator))
            active = [operator for operator in operators if operator.acts]
            if active and not self.muted and id(args[0]) in self.values:
                self._operate(active, args[0], output)
            elif not self.muted and isinstance(output, Tensor) and id(output) in self.values:
                self.values[id(output)].outputs[path] = tuple(output.shape)

        return hook

    def _operate(self, operators: list[Any], before: Tensor, after: Tensor) -> None:
        """Record what active operators made of a feature tensor."""
        stored = self.values[id(before)]
        self.record(stored.name, after, stored)
        made = self.values[id(after)]
        for operator in operators:
            if isinstance(operator, Pruner):
                made.density = float(operator.fitted(before).expand(before.shape[1:]).mean(dtype=torch.float64))
                made.operators |= {"prune"}
            else:
                made.bits = operator.bits
                made.operators |= {"quantize"}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [self.values[id(t)] for t in tree_leaves((args, kwargs)) if id(t) in self.values]
        name = func.overloadpacket.__name__
        if not self.muted and name == "embedding":  # a table's rows are features; that they came from integers is not
            self.record(self.path[-1], out, made_by=name, within=self.path[-1])
        if self.muted or not inputs:
            return out
        first = inputs[0]
        place = (self.path[-1] if self.path else "") or first.name  # a function called in the network's own forward
        if func.is_view or name in _MOVES:
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self.alive.append(tensor)
                    self.values[id(tensor)] = first
            return out
        for stored in dict.fromkeys(inputs):
            stored.uses += 1
        batch_norm = "batch_norm" in name and not _uses_batch_statistics(args)
        fused = torch.Tag.pointwise in func.tags or batch_norm
        if not fused:
            for tensor in tree_leaves((args, kwargs)):
                self.read(tensor)
        same_grid = name in _KEEPS_GRID and len({value.bits for value in inputs}) == 1
        same_zeros = name.removesuffix("_") in _KEEPS_ZEROS
        keeps = {"grid": same_grid and name != "cat", "zeros": same_zeros or (same_grid and name != "cat")}
        self.record(
            place,
            out,
            first,
            grid=same_grid,
            zeros=same_zeros,
            made_by=name,
            within=self.path[-1] if self.path else "",
            fused=fused,
            keeps=frozenset(word for word, kept in keeps.items() if kept),
            inputs=tuple(dict.fromkeys(inputs)),
        )
        return out


def _uses_batch_statistics(args: Any) -> bool:
    flags = [value for value in args if isinstance(value, bool)]
    return bool(flags and flags[0])
