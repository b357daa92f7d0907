"""The operators of one feature map: pruner, then quantizer, in one function where both are active."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from qprune.compression.pair import operate
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer


class FeatureOperators(nn.Module):
    """A pruner and a quantizer (either may be missing) of one feature map, structurally in this order (section 3).

    fresh: the module in front makes new tensors that its own gradient does not need (which may be worked in, if nobody
    else has got them).
    hand_on: while it is not None, the ReLU behind is taken along (see `rectified.py`): it is told the result and
    `site`, and what it returns is handed on.
    """

    pruner: Pruner | None
    quantizer: Quantizer | None

    def __init__(self, pruner: Pruner | None, quantizer: Quantizer | None, site: str = "", fresh: bool = False) -> None:
        super().__init__()
        self.site = site  # the path in the plan, which for an input does not follow from where this stands
        self.fresh = fresh
        self.register_module("pruner", pruner)
        self.register_module("quantizer", quantizer)
        self.hand_on: Callable[[Tensor, str], Tensor] | None = None

    def forward(self, x: Tensor, in_place: bool = False) -> Tensor:
        """The operators that are active, on x (B, ...); `in_place`: the result may take the place of x."""
        pruner: Pruner | None = self._modules["pruner"]  # type: ignore[assignment]  # past Module.__getattr__
        quantizer: Quantizer | None = self._modules["quantizer"]  # type: ignore[assignment]
        if self.hand_on is not None and in_place and quantizer is not None and _rectifies(quantizer):
            mask = None if pruner is None else pruner.mask_for(x)
            return self.hand_on(quantizer.quantized(x, mask, in_place, rectify=True), self.site)
        return operate(pruner, quantizer, x, in_place)


def _rectifies(quantizer: Quantizer) -> bool:
    """Whether a ReLU behind can be taken into the quantizer's passes now."""
    return quantizer.active and quantizer.gradient == "clip_value" and not quantizer.collecting
