"""Fig. 2: the values of each quantized feature against the range of its grid."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qprune.compression.functional import integer_range
from qprune.compression.prepare import FeatureOperators

ELEMENTS = 1 << 22  # counted per site, the first ones that come: enough for a tail of one in a million
_BINS, _BINS_IN_RANGE = 512, 128


@dataclass
class Counts:
    """Counts of a feature's values in bins whose width doubles for far values."""

    site: str
    bits: int
    decimal: int
    width: float = 0.0
    elements: int = 0
    below: int = 0  # the range of the grid: [-2^(bits-1), 2^(bits-1) - 1] * 2^-decimal
    above: int = 0
    least: float = float("inf")
    largest: float = float("-inf")
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))

    def __post_init__(self) -> None:
        self.width = 2.0 ** (self.bits - self.decimal) / _BINS_IN_RANGE

    @property
    def range(self) -> tuple[float, float]:
        """Return the least and the largest value of the grid."""
        low, high = integer_range(self.bits)
        return low * 2.0**-self.decimal, high * 2.0**-self.decimal

    def add(self, values: Tensor) -> None:
        """Count `values`, of any shape; those beyond `ELEMENTS` in all are left out."""
        values = values.detach().flatten()[: max(0, ELEMENTS - self.elements)].double()
        values = values[torch.isfinite(values)]
        if not values.numel():
            return
        (low, high), least, largest = self.range, values.min().item(), values.max().item()
        self.least, self.largest = min(self.least, least), max(self.largest, largest)
        self.below += int((values < low).sum())
        self.above += int((values > high).sum())
        self.elements += values.numel()
        while max(-least, largest) >= _BINS // 2 * self.width:
            pairs = self.counts.view(-1, 2).sum(1)
            self.counts = torch.nn.functional.pad(pairs, (_BINS // 4, _BINS // 4))
            self.width *= 2
        place = (values / self.width).floor().long() + _BINS // 2
        self.counts += torch.bincount(place, minlength=_BINS).cpu()

    def as_plain(self) -> dict[str, Any]:
        """Return plain values without empty ends; `start` is the first bin's lower edge."""
        low, high = self.range
        filled = self.counts.nonzero().flatten()
        first, last = int(filled[0]), int(filled[-1])
        start, counts = (first - _BINS // 2) * self.width, self.counts[first : last + 1].tolist()
        return vars(self) | {"low": low, "high": high, "start": start, "counts": counts}


def feature_histograms(network: nn.Module, evaluate: Callable[[], object]) -> list[dict[str, Any]]:
    """Count the values at every feature quantizer while `evaluate` runs, see `Counts`.

    Pruned elements are not counted. `evaluate` is broken off once every site has seen `ELEMENTS` values.
    """
    sites: list[tuple[FeatureOperators, Counts]] = []
    for operators in network.modules():
        if isinstance(operators, FeatureOperators) and operators.quantizer is not None:
            quantizer = operators.quantizer
            sites.append((operators, Counts(operators.site, quantizer.bits, int(quantizer.fraction_bits))))

    def count(operators: Any, args: tuple[Any, ...], counts: Counts) -> None:
        x, pruner = args[0], operators.pruner
        counts.add(x.masked_select(pruner.fitted(x).bool().expand_as(x)) if pruner and pruner.active else x)
        if all(each.elements >= ELEMENTS for _, each in sites):
            raise Enough

    with ExitStack() as hooks, suppress(Enough):
        for operators, counts in sites:
            hooks.callback(operators.register_forward_pre_hook(partial(count, counts=counts)).remove)
        if sites:
            evaluate()
    return [counts.as_plain() for _, counts in sites if counts.elements]


class Enough(BaseException):
    """Ends a pass whose result is not needed; no `except Exception` stops it."""
