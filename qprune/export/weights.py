"""The weight of a layer as whole numbers on its grid: what is written to files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qprune.compression.fake_quantize import power_of_two
from qprune.compression.functional import integer_range
from qprune.compression.prepare import find_operators
from qprune.compression.quantizer import Quantizer


@dataclass(frozen=True)
class Weight:
    """real = integers * 2^-decimal. decimal: int32 that broadcasts with integers (int32, the layer's shape)."""

    integers: Tensor
    decimal: Tensor
    bits: int

    @property
    def finest(self) -> int:
        """Decimal bits of the finest part: the whole weight is integers `on_finest` times 2^-finest."""
        return int(self.decimal.max())

    @property
    def on_finest(self) -> Tensor:
        """Integers (int64) on the finest part's grid; wider than `bits` where decimals differ."""
        return self.integers.long() << (self.finest - self.decimal).long()

    @property
    def real(self) -> Tensor:
        """The weight in float32, as trained."""
        return self.integers.float() * power_of_two(-self.decimal)


@torch.no_grad()
def weights_of(network: nn.Module) -> dict[str, Weight]:
    """Layers whose weight lies on a grid, by path. What an active quantizer made must be whole numbers: checked."""
    found = {}
    for placed in find_operators(network):
        quantizer = placed.operator
        if placed.chain is None or not isinstance(quantizer, Quantizer) or not quantizer.active:
            continue
        layer_weight = network.get_submodule(placed.path).weight
        assert isinstance(layer_weight, Tensor)
        value = layer_weight.detach()
        shape = [1] * value.dim()
        if quantizer.decimal.dim():
            assert quantizer.axis is not None
            shape[quantizer.axis] = -1
        decimal = quantizer.decimal.view(shape)
        scaled = value.double() * power_of_two(decimal, torch.float64)
        integers = scaled.round()
        assert torch.equal(integers, scaled), f"the weight of {placed.path} is not on its grid"
        found[placed.path] = Weight(integers.to(torch.int32), decimal.to(torch.int32), quantizer.bits)
    return found


def by_output(weight: Weight) -> tuple[Tensor, Tensor, float]:
    """Whole numbers of 8 bits with one power-of-two step per output channel.

    Returns integers (out, ...), their decimal bits (out,), and the largest change of a weight as a fraction of its
    channel's largest: 0 unless decimal bits differ by input channel.
    """
    fine = weight.on_finest
    rows = fine.flatten(1)
    low, high = integer_range(weight.bits)
    decimals = torch.full((len(rows),), weight.finest)
    out, error = rows.clone(), 0.0
    for i, row in enumerate(rows):
        drop = 0
        while True:
            whole = torch.round(row.double() / 2**drop)
            if low <= whole.min() and whole.max() <= high:
                break
            drop += 1
        out[i], decimals[i] = whole.long(), weight.finest - drop
        largest = float(row.abs().max())
        if largest:
            error = max(error, float((whole * 2**drop - row).abs().max()) / largest)
    return out.view(fine.shape).to(torch.int32), decimals, error
