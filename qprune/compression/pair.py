"""The pruner and the quantizer of one tensor, called with as little around them as can be.

A step of a small network takes a few milliseconds, in which every call of a module counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qprune.compression.operator import Operator, has_hooks
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer


def operate(pruner: Pruner | None, quantizer: Quantizer | None, x: Tensor, in_place: bool = False) -> Tensor:
    """The operators that are active, pruner first (section 3), on a feature (B, ...) or a weight.

    Where both are, in one function: one pass over x, forward and backward, and no masked copy is kept.
    in_place: the result may take the place of x.
    """
    if pruner is not None and quantizer is not None and _act_as_one(pruner, quantizer):
        return quantizer.quantized(x, pruner.mask_for(x), in_place)
    if pruner is not None:
        x = called(pruner, x, in_place)
    return x if quantizer is None else called(quantizer, x, in_place)


def _act_as_one(pruner: Pruner, quantizer: Quantizer) -> bool:
    apart = quantizer.collecting or has_hooks(pruner) or has_hooks(quantizer)
    return pruner.active and quantizer.active and not apart


def called(module: nn.Module, *args: Any) -> Tensor:
    """What a call of the module gives, past all that a call does for hooks where there are none."""
    result: Tensor = module(*args) if has_hooks(module) else module.forward(*args)
    return result


class WeightOperators(parametrize.ParametrizationList):
    """The operators around a weight, in the order in which they were placed; others' parametrizations may follow."""

    def forward(self) -> Tensor:
        """The weight as the layer uses it."""
        x: Tensor = self._parameters["original"]  # type: ignore[assignment]  # past Module.__getattr__
        around = tuple(self._modules.values())
        if all(isinstance(each, Operator) and each.at_rest for each in around):
            return x
        if len(around) == 2 and isinstance(around[0], Pruner) and isinstance(around[1], Quantizer):
            return operate(around[0], around[1], x)
        for each in around:
            assert each is not None
            x = called(each, x)
        return x


def read_directly(layer: nn.Module, name: str) -> None:
    """Have `layer.<name>`, which is parametrized, computed with fewer calls than torch needs to get there."""
    kind = type(layer)  # made by torch for this layer, and shared by its copies
    as_torch_does: property = getattr(kind, name)

    def read(self: Any) -> Tensor:
        if parametrize._cache_enabled or torch.compiler.is_compiling():
            value: Tensor = as_torch_does.fget(self)  # type: ignore[misc]
            return value
        return called(self._modules["parametrizations"]._modules[name])

    setattr(kind, name, property(read, as_torch_does.fset))
