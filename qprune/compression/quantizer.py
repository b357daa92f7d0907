"""Delayed and saturated quantization (Eq. 5 and 7): decimal bits that an event chooses and then freezes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qprune.compression import packing
from qprune.compression.distributed import gathered
from qprune.compression.fake_quantize import quantize_checked
from qprune.compression.functional import (
    GRADIENTS,
    ROUNDINGS,
    check_saturate,
    integer_range,
    optimal_decimal,
    smallest_error,
    squared_errors,
)
from qprune.compression.operator import Operator
from qprune.errors import UserError, one_of

# Elements of a feature window on which d is chosen. A window that holds more is sampled evenly (spec 7.9: the authors
# keep all of it, 13.5 GB for MobileNetV2), of one that holds fewer every element counts.
WINDOW_CAPACITY = 1 << 20
_TAKEN_AT_ONCE = 1 << 17  # elements: what is computed to find them is then no memory that anybody notices


class Quantizer(Operator):
    """Rounds to a grid of `bits` bits with power-of-two steps 2^-decimal.

    decimal: a fixed d, or None to have an event choose d* (Eq. 5). decimals: the candidates. saturate: quantiles of
    Eq. 6. axis: the dimension that has a d of its own per index (weights only), or None for one d in all.

    Buffers: decimal, int32, 0-d or (C,); kept, what the window has come to (features only): the sum of squared errors
    of each candidate, float64, or with `saturate`, whose quantiles show at its end, its values, float32.
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
        self.keeps_values = self.saturate != (0.0, 1.0)
        self.register_buffer("kept", torch.empty(0, dtype=torch.float32 if self.keeps_values else torch.float64))

    def size_for_weight(self, weight: Tensor) -> None:
        """Give `decimal` one entry per index of `axis`."""
        self.of_feature = False
        if self.axis is not None and self.decimal.dim() == 0:
            self.decimal = self.decimal.repeat(weight.shape[self.axis])

    def start_window(self) -> None:
        """Forget what was observed; called at the first step of a window."""
        self.kept = self.kept.new_empty(0)

    def observe(self, x: Tensor) -> None:
        """Take in this call's samples (B, ...), or `budget` of their elements, every n-th, from another start each."""
        samples = self.in_window(x)
        count, size = samples.shape[0], samples.shape[1:].numel()
        keep = min(size, max(1, self.budget // max(1, count)))
        first = self.first_sample
        for part in samples.split(max(1, _TAKEN_AT_ONCE // max(1, keep))):
            self._take_in(_every_nth(part, keep, first) if keep < size else part)
            first += part.shape[0]

    def _take_in(self, samples: Tensor) -> None:
        values = samples.float().flatten()
        if self.keeps_values:
            self.kept = torch.cat([self.kept, values])
            return
        errors = squared_errors(values, self.bits, self.decimals, self.rounding)
        self.kept = self.kept + errors if self.kept.numel() else errors

    def observed(self) -> Tensor:
        """`kept` of the window's samples on all ranks; empty if there were none."""
        together = gathered(self.kept)
        if self.keeps_values or together.numel() == 0:
            return together
        return together.view(-1, len(self.decimals)).sum(0)

    def update(self, x: Tensor) -> None:
        """A quantization event: freeze d* for x, a weight or any values."""
        chosen = None
        if self.searches:
            chosen = optimal_decimal(x, self.bits, self.saturate, self.decimals, self.rounding, self.axis)
        self._freeze(chosen)

    def update_by_window(self, observed: Tensor) -> None:
        """A quantization event: freeze d* for the window of which that was observed."""
        if self.keeps_values:
            self.update(observed)
        else:
            self._freeze(smallest_error(observed, self.decimals) if self.searches else None)

    def _freeze(self, chosen: Tensor | None) -> None:
        if chosen is not None:
            self.decimal.copy_(chosen)  # in place, for the same reason as a pruner's mask
        self.start_window()
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        kept = state_dict.get(f"{prefix}kept")
        if kept is not None and not self.keeps_values and kept.numel() not in (0, len(self.decimals)):
            raise UserError(
                f"the state was saved inside a window of decimal bits and does not fit: {prefix}kept has "
                f"{kept.numel()} numbers, and there are {len(self.decimals)} candidates; take a state from before the "
                "window, or delete the run's checkpoints to train it afresh"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        shown = self.decimal.tolist() if self.decimal.numel() <= 8 else f"{self.decimal.numel()} of axis {self.axis}"
        return f"bits={self.bits}, decimal={shown}, {self.rounding}, active={self.active}"


def _every_nth(x: Tensor, keep: int, first: int) -> Tensor:
    """`keep` elements of each sample of x, (B, keep): in the order of x.flatten(1), from another start in each.

    first: number of the first sample. Where channels are last in memory, x is not copied.
    """
    size = x.shape[1:].numel()
    start = (torch.arange(x.shape[0], device=x.device) + first) * 7919 % size
    index = (start[:, None] + torch.arange(keep, device=x.device) * (size // keep)) % size
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        channels, places = x.shape[1], x.shape[2] * x.shape[3]
        index = index % places * channels + index // places
        x = x.permute(0, 2, 3, 1)
    return x.flatten(1).gather(1, index)
