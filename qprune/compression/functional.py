"""The paper's equations, one function each, on plain tensors.

Symbols as in the paper: x a weight or feature tensor, N = `bits`, d = `decimal` (fraction bits: binary digits right of
the point), s = `sparsity`, (q_l, q_u) = `saturate` as fractions. Where the paper and its authors' code differ, the
default is the code's behaviour and the paper's is an option (spec section 6).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from qprune.compression.fake_quantize import FakeQuantize, Grid, shaped_along
from qprune.errors import UserError, one_of

ROUNDINGS = ("trunc", "floor", "nearest")
GRADIENTS = ("clip_value", "ste", "in_range")
MASK_RULES = ("exact", "threshold")
# Elements that one candidate of the search for d works on at a time: enough to be efficient, few enough for caches.
_SEARCH_CHUNK = 1 << 20


def integer_range(bits: int) -> tuple[int, int]:
    """Return the smallest and largest integer of a grid, or raise UserError unless bits is in 2..16."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 16:
        raise UserError(f"bits={bits!r} is not a whole number from 2 to 16; type for example bits=8")
    return Grid(bits).bounds


def check_decimal(decimal: int) -> None:
    """Raise UserError unless `decimal` is in -100..100, beyond which float32 has not every power of two needed."""
    if abs(decimal) > 100:
        raise UserError(f"decimal={decimal} is not a number of fraction bits from -100 to 100")


def fake_quantize(
    x: Tensor,
    bits: int = 8,
    decimal: int | Tensor = 5,
    rounding: str = "trunc",
    gradient: str = "clip_value",
    axis: int | None = None,
) -> Tensor:
    """Round x to a power-of-two grid (Eq. 1), with a straight-through gradient.

    The result is clamp(round(x * 2^d), -2^(N-1), 2^(N-1) - 1) * 2^-d. Infinities saturate.

    Args:
        x: Any shape and floating type.
        bits: N, from 2 to 16.
        decimal: d, an integer (negative ones are legal), a 0-d integer tensor, or one of shape (C,) for `axis`.
        rounding: `trunc` toward zero (the authors' code), `floor` (Eq. 1) or `nearest` (ties to even).
        gradient: `clip_value` clamps the incoming gradient to the grid's range (Eq. 2 as the authors coded it, spec
            1.2), `ste` passes it on, `in_range` passes it where x did not saturate.
        axis: The dimension of x, of size C, that `decimal` runs along.

    Returns:
        A tensor of x's shape and type, or float32 where that type cannot hold the grid (float16, and bfloat16 above 9
        bits).

    Raises:
        UserError: `bits` is outside 2..16, `decimal` outside -100..100 or unfit for `axis`, or a word is unknown.
    """
    integer_range(bits)
    one_of("rounding", rounding, ROUNDINGS)
    one_of("gradient", gradient, GRADIENTS)
    if isinstance(decimal, int):
        check_decimal(decimal)
    decimal = torch.as_tensor(decimal, device=x.device).to(torch.int32)
    shaped_along(decimal, x, axis)
    out: Tensor = FakeQuantize.apply(x, decimal, None, Grid(bits, rounding, gradient, axis))
    return out


def all_finite(x: Tensor) -> Tensor:
    """Return whether x (any shape, floating type) is free of NaN and infinities: 0-d bool, without a host sync.

    The smallest and the largest element show it: NaN becomes both. That reads x once, where `torch.isfinite(x).all()`
    writes two tensors of x's size.
    """
    if not x.numel():
        return torch.ones((), dtype=torch.bool, device=x.device)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)  # in the order of memory: else torch copies it
    low, high = torch.aminmax(x)
    return torch.isfinite(low) & torch.isfinite(high)


def saturate(x: Tensor, low: float, high: float) -> Tensor:
    """Clip x to its `low` and `high` quantiles: saturation S_a (Eq. 6).

    Args:
        x: Any shape.
        low, high: Fractions with 0 <= low < high <= 1; quantiles are interpolated linearly.
    """
    if not check_saturate((low, high)).clips:
        return x
    values = x.detach().flatten()
    values = values if values.dtype == torch.float64 else values.float()
    least, most = torch.quantile(values, torch.tensor([low, high], dtype=values.dtype, device=x.device)).to(x.dtype)
    return torch.clamp(x, least, most)


_saturate = saturate  # `optimal_decimal` has an argument of this name


class Saturation(NamedTuple):
    """Quantiles of Eq. 6, and the error in which they are used.

    Attributes:
        low, high: Fractions with 0 <= low < high <= 1.
        literal: Whether d* minimizes |Q(x, d) - S(x)|^2, as Eq. 7 is printed, instead of the authors'
            |Q(S(x), d) - S(x)|^2 (spec decision 7). Without saturation the two are one.
    """

    low: float = 0.0
    high: float = 1.0
    literal: bool = False

    @property
    def clips(self) -> bool:
        """Whether anything is cut off."""
        return (self.low, self.high) != (0.0, 1.0)


def check_saturate(bounds: Sequence[float]) -> Saturation:
    """Return quantiles (low, high), or a `Saturation`, as the latter; raise UserError for others."""
    literal = False
    if isinstance(bounds, Saturation):
        *bounds, literal = bounds
    if len(bounds) != 2 or not 0.0 <= bounds[0] < bounds[1] <= 1.0:
        raise UserError(
            f"saturate={list(bounds)!r} is not a pair of rising quantiles within [0, 1]; "
            "type saturate=[0.0,1.0] for none, or for example saturate=[0.0001,0.9999]"
        )
    return Saturation(float(bounds[0]), float(bounds[1]), literal)


def candidate_decimals(largest: Tensor, bits: int) -> Tensor:
    """Return candidates for d that cover numbers of any scale, on the device of `largest`, without a host sync.

    The finest grid that holds the largest magnitude lies at d = floor(log2((2^(N-1) - 1) / largest)). Candidates go 8
    digits below, for larger numbers that are still to come, and 18 above: with n elements, it can pay to cut off a
    largest one up to some log2(n) / 2 digits further.

    Args:
        largest: Magnitudes, any shape; zeros and what is not finite count for nothing.
        bits: N, from 2 to 16.

    Returns:
        int32, (K,), rising.
    """
    fitting = torch.log2(integer_range(bits)[1] / largest.double()).floor()
    known = fitting.isfinite()
    low = torch.where(known, fitting, torch.inf).min()
    high = torch.where(known, fitting, -torch.inf).max()
    any_known = known.any()
    low, high = torch.where(any_known, low, 0.0), torch.where(any_known, high, 0.0)
    count = 27 if largest.dim() == 0 else 27 + int(high - low)
    return (low - 8 + torch.arange(count, device=largest.device)).clamp(-100, 100).to(torch.int32)


def squared_errors(
    x: Tensor,
    bits: int,
    decimals: Iterable[int | Tensor],
    rounding: str = "trunc",
    axis: int | None = None,
    wanted: Tensor | None = None,
) -> Tensor:
    """Sum (Q(x, d) - y)^2 for each candidate d, without host syncs; y is `wanted`, or x.

    Q(x, d) - x is exact in float32 where nothing saturates, since grids are powers of two; squares are added in
    float64.

    Returns:
        float64, (K,) for K candidates, or (K, C) with `axis` of size C.
    """
    rows, targets = _rows(x, axis), _rows(x if wanted is None else wanted, axis)
    length = max(1, _SEARCH_CHUNK // rows.shape[0])
    sums = []
    for decimal in decimals:
        total = torch.zeros(rows.shape[0], dtype=torch.float64, device=x.device)
        for part, target in zip(rows.split(length, dim=1), targets.split(length, dim=1), strict=True):
            total += (fake_quantize(part, bits, decimal, rounding, "ste") - target).double().square().sum(-1)
        sums.append(total)
    errors = torch.stack(sums)
    return errors[:, 0] if axis is None else errors


def _rows(x: Tensor, axis: int | None) -> Tensor:
    """Return x as (C, M), a row per index of `axis`, or as (1, M), in float32 or float64."""
    rows = x.detach().reshape(1, -1) if axis is None else x.detach().movedim(axis, 0).flatten(1)
    return rows if rows.dtype == torch.float64 else rows.float()


def optimal_decimal(
    x: Tensor,
    bits: int = 8,
    saturate: Sequence[float] = (0.0, 1.0),
    decimals: Iterable[int] | None = None,
    rounding: str = "trunc",
    axis: int | None = None,
) -> Tensor:
    """Choose d* (Eq. 5 and 7): the candidate with the least squared error.

    The error is that of Q(S(x), d) - S(x), as in the authors' code, or that of Eq. 7 as printed, see `Saturation`. Of
    equal errors, the smallest d wins.

    Args:
        x: Any shape; finite.
        bits: N, from 2 to 16.
        saturate: Quantiles (low, high) of Eq. 6, or a `Saturation`.
        decimals: The candidates; None: those that x's scale suggests, see `candidate_decimals`.
        rounding: As in `fake_quantize`.
        axis: The dimension with a d of its own per index, or None.

    Returns:
        int32, 0-d or (C,) with `axis`.

    Raises:
        UserError: x or the candidates are empty, or a value is not finite.
    """
    given = None if decimals is None else sorted(set(decimals))
    if given == [] or x.numel() == 0:
        raise UserError(f"no decimal can be chosen from {len(given or ())} candidates and {x.numel()} values")
    if not all_finite(x):
        raise UserError("the values to choose decimal bits for are not all finite")
    low, high, literal = check_saturate(saturate)
    wanted = _saturate(x, low, high)
    if given is None:
        largest = wanted.abs().amax() if axis is None else wanted.movedim(axis, 0).flatten(1).abs().amax(1)
        candidates = candidate_decimals(largest, bits)
    else:
        candidates = torch.tensor(given, dtype=torch.int32, device=x.device)
    return least_error(squared_errors(x if literal else wanted, bits, candidates, rounding, axis, wanted), candidates)


def least_error(errors: Tensor, candidates: Tensor) -> Tensor:
    """Return the candidate with the least error, the smallest one of equals.

    Args:
        errors: (K,) or (K, C).
        candidates: (K,), rising.

    Returns:
        int32, 0-d or (C,).
    """
    # argmin does not promise the first of equal minima, so ask for the first place that equals the minimum.
    first = (errors == errors.min(dim=0, keepdim=True).values).to(torch.int8).argmax(dim=0)
    return candidates.to(torch.int32)[first]


def exact(number: float | Fraction) -> Fraction:
    """Return a number as it is written: 0.57 is 57/100, and not the double next to it."""
    return number if isinstance(number, Fraction) else Fraction(repr(float(number)))


def check_sparsity(sparsity: float | Fraction) -> float:
    """Return `sparsity` if it is a fraction in [0, 1), else raise UserError."""
    if not 0.0 <= sparsity < 1.0:
        raise UserError(f"sparsity={sparsity!r} is not in [0, 1); type for example sparsity=0.5 to prune one half")
    return float(sparsity)


def magnitude_mask(score: Tensor, sparsity: float | Fraction, rule: str = "exact") -> Tensor:
    """Mask the smallest scores (Eq. 4 and 8).

    Args:
        score: |w|, or the window's sum of |f|; any shape.
        sparsity: s, in [0, 1), taken as it is written, see `exact`.
        rule: `exact`: exactly floor(s * n) zeros; of equal scores those with the smaller index are pruned first, so
            that dead neurons cannot stop pruning. `threshold`: the authors' rule (spec 2.1), everything at or above
            the element of rank int(s * n - 1) stays, ties included.

    Returns:
        A bool tensor of score's shape, False where it is pruned.
    """
    check_sparsity(sparsity)
    one_of("rule", rule, MASK_RULES)
    flat = score.detach().flatten()
    count = math.floor(exact(sparsity) * flat.numel())  # in doubles, 0.57 * 1200 is 683.9999999999999
    if rule == "threshold":
        return score >= flat.kthvalue(max(count, 1)).values
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    pruned = flat < threshold
    equal = (flat == threshold).nonzero().flatten()
    pruned[equal[: count - int(pruned.sum())]] = True
    return ~pruned.view(score.shape)


def prune(x: Tensor, mask: Tensor) -> Tensor:
    """Return x * mask (Eq. 3), the mask broadcast over leading dimensions."""
    return x * mask.to(x.dtype)
