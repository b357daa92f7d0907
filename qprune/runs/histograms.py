"""Fig. 2: how the values of each quantized feature of a trained network lie against the range of its grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qprune.compression.functional import integer_range
from qprune.compression.prepare import FeatureOperators, find_operators
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer

HISTOGRAMS_FILE = "histograms.json"
ELEMENTS = 1 << 22  # counted per site, the first ones that come: enough for a tail of one in a million
_BINS, _BINS_IN_RANGE = 512, 128


@dataclass
class Counts:
    """Counts of a feature's values in bins of one width, which doubles whenever a value lies beyond the outermost.

    bits, decimal: of the grid, whose range is [-2^(bits-1), 2^(bits-1) - 1] * 2^-decimal; it holds about 128 bins.
    below, above: values outside that range.
    """

    site: str
    bits: int
    decimal: int
    width: float = 0.0
    elements: int = 0
    below: int = 0
    above: int = 0
    least: float = float("inf")
    largest: float = float("-inf")
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))

    def __post_init__(self) -> None:
        self.width = 2.0 ** (self.bits - self.decimal) / _BINS_IN_RANGE

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest value of the grid."""
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
        """Everything as plain values, without empty bins at the ends; `start` is the lower edge of the first bin."""
        low, high = self.range
        filled = self.counts.nonzero().flatten()
        first, last = int(filled[0]), int(filled[-1])
        names = ("site", "bits", "decimal", "elements", "below", "above", "least", "largest", "width")
        plain = {name: getattr(self, name) for name in names}
        plain |= {"low": low, "high": high, "start": (first - _BINS // 2) * self.width}
        return plain | {"counts": self.counts[first : last + 1].tolist()}


def feature_histograms(network: nn.Module, evaluate: Callable[[], object]) -> list[dict[str, Any]]:
    """What reaches every feature quantizer of `network` while `evaluate` runs: one entry per site, see `Counts`.

    Pruned elements, which are zero and are not stored, are not counted. `evaluate` is broken off once every site has
    seen `ELEMENTS` values. Nothing is changed in the network, but for what `evaluate` changes.
    """
    found = list(_sites(network))
    if not found:
        return []
    counting = [counts for counts, _, _ in found]

    def counter(counts: Counts, pruner: Pruner | None) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def count(operator: nn.Module, args: tuple[Any, ...]) -> None:
            counts.add(_kept(args[0], pruner))
            if all(each.elements >= ELEMENTS for each in counting):
                raise _Enough

        return count

    handles = [module.register_forward_pre_hook(counter(counts, pruner)) for counts, pruner, module in found]
    try:
        evaluate()
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [counts.as_plain() for counts in counting if counts.elements]


class _Enough(BaseException):
    """Ends an evaluation whose result is not asked for; no `except Exception` on the way stops it."""


def _sites(network: nn.Module) -> Iterator[tuple[Counts, Pruner | None, nn.Module]]:
    """Counts, pruner and module that is called with the feature, of every feature quantizer."""
    pairs = {id(m.quantizer): m for m in network.modules() if isinstance(m, FeatureOperators) and m.quantizer}
    for placed in find_operators(network):
        operator = placed.operator
        if placed.kind == "feature" and isinstance(operator, Quantizer):
            pair = pairs.get(id(operator))
            counts = Counts(placed.path, operator.bits, int(operator.decimal))
            yield counts, pair.pruner if pair else None, pair or operator


def _kept(x: Tensor, pruner: Pruner | None) -> Tensor:
    """The elements of a feature (B, C, ...) that its pruner keeps."""
    if pruner is None or not pruner.active:
        return x
    return x.masked_select(pruner.fitted(x).bool().expand_as(x))
