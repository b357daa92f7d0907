"""The operators of one feature map: pruner, then quantizer, in one function where both are active."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer


class FeatureOperators(nn.Module):
    """A pruner and a quantizer (either may be missing) of one feature map, structurally in this order (section 3).

    hand_on: while it is not None, the ReLU behind is taken along (see `rectified.py`): it is told the result and
    `site`, and what it returns is handed on.
    """

    def __init__(self, pruner: Pruner | None, quantizer: Quantizer | None, site: str = "") -> None:
        super().__init__()
        self.site = site  # the path in the plan, which for an input does not follow from where this stands
        self.pruner, self.quantizer = pruner, quantizer
        self.hand_on: Callable[[Tensor, str], Tensor] | None = None

    def forward(self, x: Tensor, in_place: bool = False) -> Tensor:
        """The operators that are active, on x (B, ...); `in_place`: the result may take the place of x."""
        pruner, quantizer = self.pruner, self.quantizer
        prunes = pruner is not None and pruner.active
        if quantizer is not None and quantizer.active and not quantizer.collecting:
            rectify = self.hand_on is not None and in_place and quantizer.gradient == "clip_value"
            if prunes or rectify:
                # All change x: one pass over it, forward and backward, and no masked copy is kept.
                if pruner is not None and pruner.collecting:
                    pruner.observe(x)
                mask = pruner.fitted(x) if pruner is not None and prunes else None
                x = quantizer.quantized(x, mask, in_place, rectify)
                return self.hand_on(x, self.site) if rectify and self.hand_on is not None else x
        if pruner is not None:
            x = pruner(x, in_place)
        if quantizer is not None:
            x = quantizer(x, in_place)
        return x
