"""Delayed and saturated quantization (Eq. 5 and 7): decimal bits that an event chooses and then freezes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qprune.compression import packing
from qprune.compression.functional import (
    GRADIENTS,
    ROUNDINGS,
    check_saturate,
    integer_range,
    optimal_decimal,
)
from qprune.compression.operator import Operator
from qprune.compression.straight_through import quantize_checked
from qprune.errors import one_of

# Elements of a feature window that are kept for the choice of d: 4 MiB a site. A window that holds more is sampled
# evenly (spec 7.9: the authors keep all of it, 13.5 GB for MobileNetV2), one that holds fewer is kept whole.
WINDOW_CAPACITY = 1 << 20


class Quantizer(Operator):
    """Rounds to a grid of `bits` bits with power-of-two steps 2^-decimal.

    decimal: a fixed d, or None to have an event choose d* (Eq. 5). decimals: the candidates. saturate: quantiles of
    Eq. 6. axis: the dimension that has a d of its own per index (weights only), or None for one d in all.

    Buffers: decimal, int32, 0-d or (C,); kept, float32, the observed values of the window (features only).
    """

    decimal: Tensor
    kept: Tensor

    def __init__(
        self,
        bits: int = 8,
        decimal: int | None = None,
        rounding: str = "trunc",
        gradient: str = "clip_value",
        saturate: Sequence[float] = (0.0, 1.0),
        axis: int | None = None,
        decimals: Sequence[int] = tuple(range(20)),
    ) -> None:
        super().__init__()
        self.bounds = integer_range(bits)
        one_of("rounding", rounding, ROUNDINGS)
        one_of("gradient", gradient, GRADIENTS)
        self.bits, self.rounding, self.gradient, self.axis = bits, rounding, gradient, axis
        self.saturate, self.decimals = check_saturate(saturate), tuple(sorted(decimals))
        self.searches = decimal is None
        self.budget = WINDOW_CAPACITY
        self.of_feature = True  # unless it is placed on a weight
        self.register_buffer("decimal", torch.tensor(0 if decimal is None else decimal, dtype=torch.int32))
        self.register_buffer("kept", torch.empty(0))

    def size_for_weight(self, weight: Tensor) -> None:
        """Give `decimal` one entry per index of `axis`."""
        self.of_feature = False
        if self.axis is not None and self.decimal.dim() == 0:
            self.decimal = self.decimal.repeat(weight.shape[self.axis])

    def start_window(self) -> None:
        """Forget what was observed; called at the first step of a window."""
        self.kept = self.kept.new_empty(0)

    def observe(self, x: Tensor) -> None:
        """Keep this call's samples (B, ...), or `budget` of their elements: every n-th, from another start in each."""
        samples = self.in_window(x).float().flatten(1)
        count, size = samples.shape
        keep = max(1, self.budget // max(1, count))
        if keep < size:
            stride = size // keep
            start = (torch.arange(count, device=x.device) + self.first_sample) * 7919 % size
            index = (start[:, None] + torch.arange(keep, device=x.device) * stride) % size
            samples = samples.gather(1, index)
        self.kept = torch.cat([self.kept, samples.flatten()])

    def update(self, x: Tensor) -> None:
        """A quantization event: freeze d* for x, a weight or the values of the window."""
        if self.searches:
            chosen = optimal_decimal(x, self.bits, self.saturate, self.decimals, self.rounding, self.axis)
            self.decimal.copy_(chosen)  # in place, for the same reason as a pruner's mask
        self.kept = self.kept.new_empty(0)
        self.updates += 1

    def forward(self, x: Tensor, in_place: bool = False) -> Tensor:
        """x (B, C, ...) or a weight, on the grid while active; observed first while a window is open.

        in_place: the result may take the place of x.
        """
        if self.collecting:
            self.observe(x)
        return self.quantized(x, None, in_place) if self.active else x

    def quantized(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        in_place: bool = False,
        rectify: bool = False,
        sole_reader: bool = False,
    ) -> Tensor:
        """x * mask on the grid, whatever the mode; `in_place`: the result may take the place of x.

        rectify: what a ReLU makes of that, with the gradient of both. sole_reader: nobody else reads x.
        """
        decimal: Tensor = self._buffers["decimal"]  # type: ignore[assignment]  # past Module.__getattr__
        of_feature = self.of_feature
        if of_feature:
            packing.remember(decimal, self.bounds)
            # a tanh that is taken along keeps its output a second time, which packing would look at a second time
            sole_reader = sole_reader and not packing.in_use()
        how = self.rounding, self.gradient, self.axis
        return quantize_checked(x, self.bounds, decimal, *how, mask, in_place, of_feature, rectify, sole_reader)

    def extra_repr(self) -> str:
        shown = self.decimal.tolist() if self.decimal.numel() <= 8 else f"{self.decimal.numel()} of axis {self.axis}"
        return f"bits={self.bits}, decimal={shown}, {self.rounding}, active={self.active}"
