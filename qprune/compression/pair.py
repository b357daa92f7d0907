"""The pruner and the quantizer of one tensor, called with as little around them as can be.

A step of a small network takes a few milliseconds, in which every call of a module counts.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.utils import parametrize

from qprune.compression.operator import Operator
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer


def operate(pruner: Pruner | None, quantizer: Quantizer | None, x: Tensor, in_place: bool = False) -> Tensor:
    """The operators that are active, pruner first (section 3), on a feature (B, ...) or a weight.

    Where both are, in one function: one pass over x, forward and backward, and no masked copy is kept.
    in_place: the result may take the place of x.
    """
    if pruner is not None and quantizer is not None and _act_as_one(pruner, quantizer):
        if pruner.observing and pruner.collecting:
            pruner.observe(x)
        return quantizer.quantized(x, pruner.fitted(x), in_place)
    if pruner is not None:
        x = pruner(x, in_place) if _has_hooks(pruner) else pruner.forward(x, in_place)
    if quantizer is not None:
        x = quantizer(x, in_place) if _has_hooks(quantizer) else quantizer.forward(x, in_place)
    return x


def _act_as_one(pruner: Pruner, quantizer: Quantizer) -> bool:
    alone = quantizer.observing or _has_hooks(pruner) or _has_hooks(quantizer)
    return pruner.active and quantizer.active and not alone


def _has_hooks(operator: Operator) -> bool:
    """Whether somebody waits for a call of this module."""
    return bool(operator._forward_hooks or operator._forward_pre_hooks)


class WeightOperators(parametrize.ParametrizationList):
    """The operators around a weight, in the order in which they were placed; others' parametrizations may follow."""

    def forward(self) -> Tensor:
        """The weight as the layer uses it."""
        x, around = self._parameters["original"], tuple(self._modules.values())
        assert x is not None
        if len(around) == 1 and isinstance(around[0], Pruner):
            return operate(around[0], None, x)
        if len(around) == 1 and isinstance(around[0], Quantizer):
            return operate(None, around[0], x)
        if len(around) == 2 and isinstance(around[0], Pruner) and isinstance(around[1], Quantizer):
            return operate(around[0], around[1], x)
        for each in around:
            assert each is not None
            x = each(x)
        return x
