"""Delayed and saturated quantization (Eq. 5 and 7): fraction bits that an event chooses and then freezes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qprune.compression.distributed import gathered, largest_of_ranks, rank_and_world
from qprune.compression.fake_quantize import FakeQuantize, Grid
from qprune.compression.functional import (
    GRADIENTS,
    ROUNDINGS,
    candidate_decimals,
    check_decimal,
    check_saturate,
    integer_range,
    least_error,
    optimal_decimal,
    squared_errors,
)
from qprune.compression.operator import Operator
from qprune.errors import one_of

AUTHORS_DECIMALS = tuple(range(20))  # the authors' candidates for d (spec 1.3)
# Elements of a feature window on which d is chosen. A larger window is sampled evenly (the authors keep all of it,
# 13.5 GB for MobileNetV2, spec 7.9); of a smaller one every element counts.
WINDOW_CAPACITY = 1 << 20
_CHUNK = 1 << 17  # elements that are sampled at a time, so that indices and copies stay small


class Quantizer(Operator):
    """Rounds to a grid of `bits` bits with power-of-two steps 2^-d.

    Args:
        bits: N, from 2 to 16.
        decimal: d, fixed; or the candidates of which an event chooses d* (Eq. 5), such as `AUTHORS_DECIMALS`. None:
            those that the scale of what is observed suggests.
        rounding: `trunc`, `floor` or `nearest`.
        gradient: `clip_value`, `ste` or `in_range`.
        saturate: Quantiles (low, high) of Eq. 6, or a `Saturation`.
        axis: The dimension with a d of its own per index (weights only), or None.

    Attributes:
        decimal: Buffer, 0-d or (C,): d, or 0 before the event that chooses it.
        window: float64, (2, K): the candidates, and the sum of squared errors of each (features only); with
            `saturate`, whose quantiles are known only at the end, the values themselves, float32.
        searches: Whether an event chooses d.
    """

    decimal: Tensor

    def __init__(
        self,
        bits: int = 8,
        decimal: int | Sequence[int] | None = None,
        rounding: str = "trunc",
        gradient: str = "clip_value",
        saturate: Sequence[float] = (0.0, 1.0),
        axis: int | None = None,
    ) -> None:
        super().__init__()
        integer_range(bits)
        one_of("rounding", rounding, ROUNDINGS)
        one_of("gradient", gradient, GRADIENTS)
        self.grid = Grid(bits, rounding, gradient, axis)
        self.saturate = check_saturate(saturate)
        self.searches = not isinstance(decimal, int)
        self.decimals = tuple(sorted(decimal)) if isinstance(decimal, Sequence) else None
        for each in (decimal,) if isinstance(decimal, int) else self.decimals or ():
            check_decimal(each)
        self.budget = WINDOW_CAPACITY  # elements of this call that enter the window; set with `observing`
        self.register_buffer("decimal", torch.tensor(float(decimal) if isinstance(decimal, int) else 0.0))
        self.keeps_values = self.saturate.clips

    @property
    def bits(self) -> int:
        """N."""
        return self.grid.bits

    @property
    def fraction_bits(self) -> Tensor:
        """d as int32, also where `decimal` is an average over training."""
        return self._of_average().to(torch.int32) if self.averaged else self.decimal.to(torch.int32)

    def _of_average(self) -> Tensor:
        # Before the event, `decimal` and `updates` are 0, then d and 1: the quotient of their averages is d.
        share = self.updates.clamp(torch.finfo(torch.float32).tiny, 1.0) if self.searches else 1.0
        return (self.decimal / share).round()

    @torch.no_grad()
    def settle(self) -> None:
        """Replace averages in buffers by the values that they stand for."""
        self.decimal.copy_(self._of_average())
        super().settle()

    @property
    def facts(self) -> dict[str, Any]:
        """N, d, and the dimension that d runs along."""
        return {"bits": self.bits, "decimal": self.fraction_bits.tolist(), "axis": self.grid.axis}

    def size_for_weight(self, weight: Tensor) -> None:
        """Give `decimal` one entry per index of `axis`."""
        self.grid = self.grid._replace(of_samples=False)
        if self.grid.axis is not None and self.decimal.dim() == 0:
            self.decimal = self.decimal.repeat(weight.shape[self.grid.axis])

    def clear_window(self) -> None:
        """Go on with a window of which another rank carries the errors: the candidates stay the same on all."""
        if self.window is not None and not self.keeps_values:
            self.window = torch.stack([self.window[0], torch.zeros_like(self.window[1])])
        else:
            self.window = None

    def observe(self, x: Tensor) -> None:
        """Add this call's samples (B, ...) to the window, or an even sample of `budget` of their elements."""
        samples = self.in_window(x)
        count, size = samples.shape[0], samples.shape[1:].numel()
        if not samples.numel() and rank_and_world()[1] == 1:
            return  # an empty batch has no scale; with several ranks, it still takes part in choosing candidates
        keep = min(size, max(1, self.budget // max(1, count)))
        first = self.first_sample
        for part in samples.split(max(1, _CHUNK // max(1, keep))):
            values = (_every_nth(part, keep, first) if keep < size else part).float().flatten()
            if self.keeps_values:
                self.window = values if self.window is None else torch.cat([self.window, values])
            else:
                if self.window is None:
                    candidates = self._candidates(values)
                    self.window = torch.stack([candidates.double(), torch.zeros_like(candidates, dtype=torch.float64)])
                errors = squared_errors(values, self.bits, self.window[0].to(torch.int32), self.grid.rounding)
                self.window = torch.stack([self.window[0], self.window[1] + errors])
            first += part.shape[0]

    def _candidates(self, values: Tensor) -> Tensor:
        """Return the candidates of a window that begins with these values."""
        if self.decimals is not None:
            return torch.tensor(self.decimals, dtype=torch.int32, device=values.device)
        largest = values.abs().amax() if values.numel() else values.new_zeros(())
        return candidate_decimals(largest_of_ranks(largest), self.bits)

    def observed(self) -> Tensor:
        """Return the window over the samples of all ranks; empty if there were none."""
        own = self.decimal.new_empty(0, dtype=torch.float64) if self.window is None else self.window.flatten()
        together = gathered(own)
        if self.keeps_values or together.numel() == 0:
            return together
        windows = together.view(-1, 2, own.numel() // 2 or together.numel() // 2)
        return torch.stack([windows[0, 0], windows[:, 1].sum(0)])

    def update(self, x: Tensor) -> None:
        """Carry out a quantization event: freeze d* for x, a weight or any values."""
        if self.searches:
            self._freeze(
                optimal_decimal(x, self.bits, self.saturate, self.decimals, self.grid.rounding, self.grid.axis)
            )
        else:
            self._freeze(self.decimal)

    def update_by_window(self, observed: Tensor) -> None:
        """Carry out a quantization event: freeze d* for the window that `observed` returned."""
        if self.keeps_values or not self.searches:
            self.update(observed)
        else:
            self._freeze(least_error(observed[1], observed[0]))

    def _freeze(self, chosen: Tensor) -> None:
        self.decimal.copy_(chosen)  # in place, as a pruner's mask
        self.start_window()
        self.updates += 1

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return x (B, C, ...) or a weight, on the grid while active; observe it first while a window is open.

        Args:
            x: A feature or a weight.
            mask: While active, x is multiplied by it in the same pass (Eq. 3).
        """
        if self.collecting:
            self.observe(x)
        if self.active is False:
            return x
        out: Tensor = FakeQuantize.apply(x, self.fraction_bits, mask, self.grid)
        return out if self.active else torch.where(self.updates > 0, out, x if mask is None else x * mask)

    def extra_repr(self) -> str:
        shown = (
            self.fraction_bits.tolist()
            if self.decimal.numel() <= 8
            else f"{self.decimal.numel()} of axis {self.grid.axis}"
        )
        return f"bits={self.bits}, decimal={shown}, {self.grid.rounding}, active={self.active}"


def _every_nth(x: Tensor, keep: int, first: int) -> Tensor:
    """Return `keep` elements of each sample of x, evenly spaced, with another start in each: (B, keep).

    Args:
        x: Samples (B, ...).
        keep: At most the number of elements of a sample.
        first: Number of the first sample in the global batch.
    """
    size = x.shape[1:].numel()
    start = (torch.arange(x.shape[0], device=x.device) + first) * 7919 % size
    index = (start[:, None] + torch.arange(keep, device=x.device) * (size // keep)) % size
    return x.flatten(1).gather(1, index)
