"""The pruner and the quantizer of one tensor, called with as little around them as can be.

A step of a small network takes a few milliseconds, in which every call of a module counts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

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


def called(module: nn.Module, x: Tensor, *rest: Any) -> Tensor:
    """What a call of the module gives, past all that a call does for hooks where there are none."""
    result: Tensor = module(x, *rest) if has_hooks(module) else module.forward(x, *rest)
    return result


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody waits for a call of this module, or for its gradient."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class WeightOperators(parametrize.ParametrizationList):
    """The operators around a weight, in the order in which they were placed; others' parametrizations may follow."""

    def forward(self) -> Tensor:
        """The weight as the layer uses it."""
        x: Tensor = self._parameters["original"]  # type: ignore[assignment]  # past Module.__getattr__
        around = tuple(self._modules.values())
        if len(around) == 2 and isinstance(around[0], Pruner) and isinstance(around[1], Quantizer):
            return operate(around[0], around[1], x)
        for each in around:
            assert each is not None
            x = called(each, x)
        return x
