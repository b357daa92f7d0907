"""Fixed-point arithmetic of layers: grids, and weights with the batch norm behind them folded in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor, fx

from qprune.compression.functional import integer_range
from qprune.export.trace import GridWeight, arguments

EXACT_BITS = 24  # integers up to 2^24 are exact in float32
LARGEST_BIAS = 2**30


@dataclass(frozen=True)
class FixedPoint:
    """The numbers n * 2^-decimal for whole n from low to high."""

    decimal: int
    low: int
    high: int

    @classmethod
    def signed(cls, bits: int, decimal: int) -> FixedPoint:
        """Return the grid of Eq. 1 for N = `bits` and d = `decimal`."""
        return cls(decimal, *integer_range(bits))

    @property
    def scale(self) -> float:
        """The step between two numbers."""
        return 2.0**-self.decimal

    @property
    def zero(self) -> int:
        """The zero point of its numbers in uint8."""
        return 0 if self.low >= 0 else 128

    def clipped(self, bounds: tuple[float, float] | None) -> FixedPoint | None:
        """Return the grid between two bounds; None if one of them cuts the grid and is not on it."""
        low, high = bounds or (self.low * self.scale, self.high * self.scale)
        ends = max(low / self.scale, self.low), min(high / self.scale, self.high)
        on_grid = all(end == int(end) for end in ends) and ends[0] <= ends[1]
        return replace(self, low=int(ends[0]), high=int(ends[1])) if on_grid else None

    @property
    def fits(self) -> bool:
        """Whether float32 holds all its numbers."""
        return max(-self.low, self.high) < int(2**EXACT_BITS)


@dataclass(frozen=True)
class Affine:
    """What follows the sums of a layer, by output channel in float64: factor * sums + shift."""

    factor: Tensor
    shift: Tensor

    @classmethod
    def identity(cls, channels: int) -> Affine:
        """Return what changes nothing."""
        return cls(torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))

    def after(self, bias: Tensor | None) -> Affine:
        """Return this behind the bias of a layer."""
        return self if bias is None else replace(self, shift=self.shift + bias.double() * self.factor)


def affine_of(norm: fx.Node) -> Affine | None:
    """Return a batch norm in evaluation as factor and shift; None for one of each batch's own statistics."""
    a = arguments(norm)
    tensors = {
        name: attrgetter(str(n.target))(norm.graph.owning_module).double()
        for name, n in a.items()
        if isinstance(n, fx.Node) and n.op == "get_attr"
    }
    if a["training"] or "running_var" not in tensors:
        return None
    factor = tensors.get("weight", 1) / torch.sqrt(tensors["running_var"] + a["eps"])
    return Affine(factor, tensors.get("bias", 0) - tensors["running_mean"] * factor)


@dataclass(frozen=True)
class ScaledWeight:
    """The weight of an integer layer, its batch norm folded into scale and bias.

    integers: int8, (out, ...). scale: float32, (out,), may be negative. bias: int32, (out,), in units of the input's
    scale times `scale`. error: the largest change of a weight, as a fraction of the largest in its channel.
    """

    integers: Tensor
    scale: Tensor
    bias: Tensor
    error: float


def requantized_per_channel(weight: GridWeight) -> tuple[Tensor, Tensor, float]:
    """Return integers (out, ...) and fraction bits (out,) per output channel.

    The third value is the largest change of a weight, as a fraction of the largest in its channel: 0 unless fraction
    bits differ by input channel.
    """
    rows = weight.on_finest.flatten(1).double()
    low, high = integer_range(weight.bits)
    integers, shift = rows, torch.zeros(len(rows), dtype=torch.int64)
    while bool((wide := (integers.amin(1) < low) | (integers.amax(1) > high)).any()):
        shift += wide
        integers = torch.round(rows / 2 ** shift[:, None])
    change = (integers * 2 ** shift[:, None] - rows).abs().amax(1) / rows.abs().amax(1).clamp(min=1)
    return integers.view(weight.integers.shape).to(torch.int32), weight.finest - shift, float(change.max())


def folded(
    weight: GridWeight, behind: Affine, source: FixedPoint, target: FixedPoint | None, floor: bool
) -> ScaledWeight:
    """Fold what follows a layer into the scale and the bias of its weight.

    Args:
        weight: Of the layer.
        behind: Its bias and norm.
        source, target: The grids of its input and its output; None for an output in floats.
        floor: Whether the output is rounded down, not to nearest.
    """
    integers, decimals, error = requantized_per_channel(weight)
    step = target.scale if target else 1.0
    shift = behind.shift - 0.5 * step * floor  # rounding down by rounding to nearest
    scale = behind.factor * torch.exp2(-decimals.double())
    by_channel = (-1, *[1] * (integers.dim() - 1))
    # A scale is positive where the type of the bytes holds the negated weights.
    lowest = -8 if weight.bits <= 4 else -128
    flip = (scale < 0) & (integers.flatten(1).min(1).values > lowest)
    integers = torch.where(flip.view(by_channel), -integers, integers)
    scale = torch.where(flip, -scale, scale).float()
    # A channel whose norm has a factor of about zero is its bias alone.
    unit = scale.double() * source.scale
    constant = (scale == 0) | (shift.abs() >= LARGEST_BIAS * unit.abs())
    integers = torch.where(constant.view(by_channel), 0, integers)
    scale = torch.where(constant, torch.tensor(step / source.scale), scale)
    bias = (shift / (scale.double() * source.scale)).round().clamp(-LARGEST_BIAS, LARGEST_BIAS)
    return ScaledWeight(integers.to(torch.int8), scale, bias.to(torch.int32), error)


def needs_unsigned(weight: Tensor, largest_input: int) -> bool:
    """Whether a weight (out, ...) must be uint8 for right sums on every CPU.

    Without VNNI a CPU adds two products of a uint8 (at most `largest_input`) and an int8 in 16 bits, which saturate,
    and onnxruntime returns wrong sums without an error. Any two weights of a row may be added first.
    """
    rows = weight.int().flatten(1)
    if rows.shape[1] == 1:
        return False
    top = rows.topk(2, dim=1).values.clamp(min=0).sum(1).max()
    bottom = rows.topk(2, dim=1, largest=False).values.clamp(max=0).sum(1).min()
    return bool(int(top) * largest_input > 32767 or int(bottom) * largest_input < -32768)
