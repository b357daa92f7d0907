"""The operators of one feature map: pruner, then quantizer, in one function where both are active."""

from __future__ import annotations

from torch import Tensor, nn

from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer


class FeatureOperators(nn.Module):
    """A pruner and a quantizer (either may be missing) of one feature map, structurally in this order (section 3)."""

    def __init__(self, pruner: Pruner | None, quantizer: Quantizer | None, site: str = "") -> None:
        super().__init__()
        self.site = site  # the path in the plan, which for an input does not follow from where this stands
        self.pruner, self.quantizer = pruner, quantizer

    def forward(self, x: Tensor, in_place: bool = False) -> Tensor:
        """The operators that are active, on x (B, ...); `in_place`: the result may take the place of x."""
        pruner, quantizer = self.pruner, self.quantizer
        if pruner is not None and quantizer is not None and pruner.active and quantizer.active:
            # Both change x: one pass over it fewer forward, one fewer backward, and no masked copy is kept.
            if pruner.collecting:
                pruner.observe(x)
            return quantizer.quantized(x, pruner.fitted(x), in_place)
        if pruner is not None:
            x = pruner(x, in_place)
        if quantizer is not None:
            x = quantizer(x, in_place)
        return x
