"""Which feature tensors a network stores: those that some layer reads, seen by running one example.

Elementwise operations and batch norms are taken to be fused with what makes their input, as inference engines do, so
the sum of a residual block is one stored tensor and its addends are none. A tensor is charged with the bits of the
quantizer whose grid it still lies on: ReLU, max pooling and moving elements about keep the grid, arithmetic leaves it.
It is charged with the mask of the pruner whose zeros it still has: any function with f(0) = 0 keeps those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qprune.compression.feature import FeatureOperators
from qprune.compression.operator import Operator
from qprune.compression.placement import run_example
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer

FLOAT_BITS = 32
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
    """A feature tensor: its elements, bits per element, fraction of elements kept, and what made it so.

    operators: `prune` and `quantize`, those whose zeros and grid the tensor has.
    """

    name: str
    elements: int
    bits: int = FLOAT_BITS
    density: float = 1.0
    operators: frozenset[str] = frozenset()


def features_left_alone(network: nn.Module, example: Any) -> list[Stored]:
    """The stored features that would have neither mask nor grid if every operator of `network` were active."""
    operators = [module for module in network.modules() if isinstance(module, Operator)]
    before = [operator.active for operator in operators]
    try:
        for operator in operators:
            operator.active = True
        return [stored for stored in stored_features(network, example) if not stored.operators]
    finally:
        for operator, active in zip(operators, before, strict=True):
            operator.active = active


def stored_features(network: nn.Module, example: Any) -> list[Stored]:
    """The feature tensors that layers of `network` read, the input first and the outputs last, each once."""
    trace = _Trace()
    handles = [
        hook
        for path, module in network.named_modules()
        for hook in (
            module.register_forward_pre_hook(trace.enter(path)),
            module.register_forward_hook(trace.leave(path, module), always_call=True),
        )
    ]
    try:
        trace.meet("input", example)
        with trace:
            output = run_example(network, example)
    finally:
        for handle in handles:
            handle.remove()
    for tensor in tree_leaves(output):
        trace.read(tensor)
    return list(trace.reads)


class _Trace(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.values: dict[int, Stored] = {}
        self.alive: list[Tensor] = []  # so that no id is used twice
        self.reads: dict[Stored, None] = {}
        self.path: list[str] = []
        self.muted = 0

    def meet(self, name: str, tensors: Any, like: Stored | None = None, grid: bool = True, zeros: bool = True) -> None:
        """Record new feature tensors, on the grid of `like` and with its zeros as told."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.alive.append(tensor)
                stored = self.values[id(tensor)] = Stored(name, tensor.numel())
                if like is not None and grid:
                    stored.bits = like.bits
                if like is not None and zeros:
                    stored.density = like.density
                if like is not None:
                    kept = {"quantize": grid, "prune": zeros}
                    stored.operators = frozenset(name for name in like.operators if kept[name])

    def read(self, tensor: Any) -> None:
        if id(tensor) in self.values:
            self.reads[self.values[id(tensor)]] = None

    def enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.path.append(path)
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
            active = [operator for operator in operators if operator.active]
            if active and not self.muted and id(args[0]) in self.values:
                self._operate(active, args[0], output)

        return hook

    def _operate(self, operators: list[Any], before: Tensor, after: Tensor) -> None:
        """Note what active operators made of a feature tensor."""
        stored = self.values[id(before)]
        self.meet(stored.name, after, stored)
        made = self.values[id(after)]
        for operator in operators:
            if isinstance(operator, Pruner):
                made.density = float(operator.fitted(before).expand(before.shape[1:]).mean())
                made.operators |= {"prune"}
            else:
                made.bits = operator.bits
                made.operators |= {"quantize"}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [self.values[id(t)] for t in tree_leaves((args, kwargs)) if id(t) in self.values]
        if self.muted or not inputs:
            return out
        name, first = func.overloadpacket.__name__, inputs[0]
        made_by = (self.path[-1] if self.path else "") or first.name  # a function called in the network's own forward
        if func.is_view or name in _MOVES:
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self.alive.append(tensor)
                    self.values[id(tensor)] = first
            return out
        batch_norm = "batch_norm" in name and not _uses_batch_statistics(args)
        fused = torch.Tag.pointwise in func.tags or batch_norm
        if not fused:
            for tensor in tree_leaves((args, kwargs)):
                self.read(tensor)
        same_grid = name in _KEEPS_GRID and len({value.bits for value in inputs}) == 1
        same_zeros = name.removesuffix("_") in _KEEPS_ZEROS
        self.meet(made_by, out, first, grid=same_grid, zeros=same_zeros)
        return out


def _uses_batch_statistics(args: Any) -> bool:
    flags = [value for value in args if isinstance(value, bool)]
    return bool(flags and flags[0])
