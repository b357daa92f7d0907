"""The operators of one feature map: pruner, then quantizer, in one function where both are active."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from qprune.compression.operator import has_hooks
from qprune.compression.pair import operate
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer


class FeatureOperators(nn.Module):
    """A pruner and a quantizer (either may be missing) of one feature map, structurally in this order (section 3).

    fresh: the module in front makes new tensors that its own gradient does not need, which may be worked in if nobody
    else has got them. of_tanh: it is a tanh, whose gradient then can be part of the operators' pass.
    hand_on: while it is not None, the ReLU behind is taken along (see `rectified.py`): it is told the result and
    `site`, and what it returns is handed on.
    """

    pruner: Pruner | None
    quantizer: Quantizer | None

    def __init__(
        self,
        pruner: Pruner | None,
        quantizer: Quantizer | None,
        site: str = "",
        fresh: bool = False,
        of_tanh: bool = False,
    ) -> None:
        super().__init__()
        self.site = site  # the path in the plan, which for an input does not follow from where this stands
        self.fresh, self.of_tanh = fresh, of_tanh
        self.register_module("pruner", pruner)
        self.register_module("quantizer", quantizer)
        self.hand_on: Callable[[Tensor, str], Tensor] | None = None

    @property
    def at_rest(self) -> bool:
        """Whether a call would do nothing: no operator changes x or observes it, and nobody waits for a call."""
        for each in self._modules.values():
            if each is not None and not each.at_rest:
                return False
        return not has_hooks(self)

    def forward(self, x: Tensor, sole_reader: bool = False) -> Tensor:
        """The operators that are active, on x (B, ...). sole_reader: nobody else has x."""
        pruner: Pruner | None = self._modules["pruner"]  # type: ignore[assignment]  # past Module.__getattr__
        quantizer: Quantizer | None = self._modules["quantizer"]  # type: ignore[assignment]
        in_place = sole_reader and self.fresh
        behind = self.hand_on if in_place else None
        if quantizer is None or not (behind or (self.of_tanh and sole_reader)) or not _act_alone(pruner, quantizer):
            return operate(pruner, quantizer, x, in_place)
        mask = None if pruner is None else pruner.mask_for(x)
        if behind:
            return behind(quantizer.quantized(x, mask, in_place, rectify=True), self.site)
        return quantizer.quantized(x, mask, sole_reader=True)


def _act_alone(pruner: Pruner | None, quantizer: Quantizer) -> bool:
    """Whether one function with what is behind or in front can take the place of these operators now."""
    watched = quantizer.collecting or has_hooks(quantizer) or (pruner is not None and has_hooks(pruner))
    return quantizer.active and quantizer.gradient == "clip_value" and not watched
