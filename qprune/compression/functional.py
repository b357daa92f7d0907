"""The paper's equations, one function each, on plain tensors.

Symbols as in the paper: x a weight or feature tensor, N = `bits`, d = `decimal` (binary digits right of the point),
s = `sparsity`, (q_l, q_u) = `saturate` as fractions. Where the paper and its authors' code differ, the default is the
code's behaviour and the paper's is an option (spec section 6).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from qprune.compression import native as kernels
from qprune.compression import nodes
from qprune.compression.fake_quantize import quantize_checked, shaped_along
from qprune.compression.finite import all_finite
from qprune.errors import UserError, one_of

ROUNDINGS = ("trunc", "floor", "nearest")
GRADIENTS = ("clip_value", "ste", "in_range")
MASK_RULES = ("exact", "threshold")
# What one candidate of the decimal search works on at a time: large enough to be efficient, small enough for caches.
_SEARCH_CHUNK = 1 << 20


def integer_range(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of a signed grid of `bits` bits: (-2^(N-1), 2^(N-1) - 1)."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 16:
        raise UserError(f"bits={bits!r} is not a whole number from 2 to 16; type for example bits=8")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def quantize(
    x: Tensor,
    bits: int = 8,
    decimal: int | Tensor = 5,
    rounding: str = "trunc",
    gradient: str = "clip_value",
    axis: int | None = None,
    mask: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """Uniform quantization (Eq. 1): clamp(round(x * 2^d), -2^(N-1), 2^(N-1) - 1) * 2^-d.

    x: any shape. decimal: d, an integer (negative ones are legal), a 0-d integer tensor, or one of shape (C,) with
    `axis` naming the dimension of x of size C. rounding: `trunc` toward zero (the authors' code), `floor` (Eq. 1) or
    `nearest` (ties to even). gradient: `clip_value` clamps the incoming gradient to the grid's range (Eq. 2 as the
    authors coded it, spec 1.2), `ste` passes it on, `in_range` passes it where x did not saturate.

    mask: float32 of 0 and 1 that broadcasts with x; with it the result is quantize(prune(x, mask)), cheaper.
    in_place: the result takes the place of x, if x's type holds it; autograd raises if x is needed elsewhere.

    Returns x's shape; its type unless that type cannot hold the grid (see `working_dtype`). Infinities saturate.
    Raises UserError for bits outside 2..16, an unknown word, or decimals that do not fit `axis`.
    """
    bounds = integer_range(bits)
    one_of("rounding", rounding, ROUNDINGS)
    one_of("gradient", gradient, GRADIENTS)
    if isinstance(decimal, Tensor):
        decimal = decimal.to(torch.int32)
        shaped_along(decimal, x, axis)
    return quantize_checked(x, bounds, decimal, rounding, gradient, axis, mask, in_place)


def smallest(flat: Tensor, *ranks: int) -> list[Tensor]:
    """The elements of those ranks (from 0) among the flat x, 0-d: by selection, without sorting."""
    if flat.is_cpu:  # numpy selects in a third of the time of torch's kthvalue, several ranks at once
        values = flat.detach().to(torch.promote_types(flat.dtype, torch.float32)).numpy()
        chosen = np.partition(values, sorted(set(ranks)))
        return [torch.tensor(chosen[rank]).to(flat.dtype) for rank in ranks]
    return [flat.kthvalue(rank + 1).values for rank in ranks]


def quantile(x: Tensor, fraction: float) -> Tensor:
    """The `fraction`-quantile of all elements of x, linearly interpolated, by selection: any size, no sorting."""
    flat = x.flatten()
    position = fraction * (flat.numel() - 1)
    below = math.floor(position)
    if position == below:
        return smallest(flat, below)[0]
    value, above = smallest(flat, below, below + 1)
    return value + (above - value) * (position - below)


def saturate(x: Tensor, low: float, high: float) -> Tensor:
    """Saturation S_a (Eq. 6): x clipped to its `low` and `high` quantiles, fractions with 0 <= low < high <= 1."""
    low, high = check_saturate((low, high))
    if (low, high) == (0.0, 1.0):
        return x
    return torch.clamp(x, quantile(x, low), quantile(x, high))


_saturate = saturate  # `optimal_decimal` has an argument of this name


def check_saturate(bounds: Sequence[float]) -> tuple[float, float]:
    """`bounds` as a pair of quantiles, or a UserError."""
    if len(bounds) != 2 or not 0.0 <= bounds[0] < bounds[1] <= 1.0:
        raise UserError(
            f"saturate={list(bounds)!r} is not a pair of rising quantiles within [0, 1]; "
            "type saturate=[0.0,1.0] for none, or for example saturate=[0.0001,0.9999]"
        )
    return float(bounds[0]), float(bounds[1])


def squared_errors(
    x: Tensor, bits: int, decimals: Iterable[int], rounding: str = "trunc", axis: int | None = None
) -> Tensor:
    """Sum of (x - Q(x, d))^2 for each candidate d: (K,), or (K, C) with `axis`; float64, without host syncs.

    Q(x, d) - x is exact in float32 where nothing saturates (power-of-two grids), and squares are added in float64.
    """
    candidates = list(decimals)
    rows = x.detach().reshape(1, -1) if axis is None else x.detach().movedim(axis, 0).flatten(1)
    if len(rows) == 1 and not torch.compiler.is_compiling():
        done = kernels.squared_errors(rows, candidates, integer_range(bits), rounding)
        if done is not None:
            return done if axis is None else done[:, None]
    total = torch.zeros(len(candidates), rows.shape[0], dtype=torch.float64, device=x.device)
    at_once = _candidates_at_once(x, len(candidates))
    width = max(1, _SEARCH_CHUNK // (rows.shape[0] * at_once))
    tried = torch.tensor(candidates, dtype=torch.int32, device=x.device).split(at_once)
    for part in rows.split(width, dim=1):
        part = part if part.dtype == torch.float64 else part.float()
        for sums, some in zip(total.split(at_once), tried, strict=True):
            difference = quantize(part.expand(len(some), *part.shape), bits, some, rounding, "ste", axis=0).sub_(part)
            sums += difference.double().square_().sum(-1)
    return total[:, 0] if axis is None else total


def _candidates_at_once(x: Tensor, count: int) -> int:
    """On a GPU and for a compiler all, for each call costs time; on a CPU one, on a part of x that stays in caches."""
    return count if x.is_cuda or torch.compiler.is_compiling() else 1


def optimal_decimal(
    x: Tensor,
    bits: int = 8,
    saturate: Sequence[float] = (0.0, 1.0),
    decimals: Iterable[int] = range(20),
    rounding: str = "trunc",
    axis: int | None = None,
) -> Tensor:
    """d* (Eq. 5 and 7): the candidate with the least squared error on the saturated x; the smallest d wins ties.

    The error compared is Q(S(x), d) - S(x), as in the authors' code (spec decision 7). Returns an int32 tensor, 0-d or
    (C,) with `axis`. Raises UserError for an empty x or list of candidates, or values that are not finite.
    """
    candidates = sorted(set(decimals))
    if not candidates or x.numel() == 0:
        raise UserError(f"no decimal can be chosen from {len(candidates)} candidates and {x.numel()} values")
    if not all_finite(x):
        raise UserError("the values to choose decimal bits for are not all finite")
    low, high = check_saturate(saturate)
    return _search(_saturate(x, low, high), bits, candidates, rounding, axis)


def _search(x: Tensor, bits: int, candidates: Sequence[int], rounding: str, axis: int | None) -> Tensor:
    """The candidate of least squared error, with only those tried that can win.

    While nothing saturates, one binary digit more never makes the error larger: the grid is a refinement. So the
    largest d at which the largest |x| still fits is where to begin. Upwards, saturation alone loses ever more, and soon
    more than the least error; downwards only equal errors matter, since the smallest d wins ties.
    """
    rows = x.detach().reshape(1, -1) if axis is None else x.detach().movedim(axis, 0).flatten(1)
    least, most = integer_range(bits)
    largest = rows.abs().amax(1).double()
    scales = torch.tensor([2.0**d for d in candidates], dtype=torch.float64, device=x.device)
    fitting = (largest[:, None] * scales <= most).sum(1).sub(1).clamp(min=0)  # fits at d: fits at all smaller ones
    low, high = int(fitting.min()), int(fitting.max())
    errors = squared_errors(rows, bits, candidates[low : high + 1], rounding, 0)
    while high + 1 < len(candidates):
        lost = _lost_beyond(rows, -least / float(scales[high + 1])) * (1 - 1e-6)  # for the rounding of float32
        if bool((lost > errors.min(dim=0).values).all()):
            break
        high += 1
        errors = torch.cat([errors, squared_errors(rows, bits, candidates[high : high + 1], rounding, 0)])
    while low > 0 and bool((errors[0] == errors.min(dim=0).values).any()):
        low -= 1
        errors = torch.cat([squared_errors(rows, bits, candidates[low : low + 1], rounding, 0), errors])
    chosen = smallest_error(errors, candidates[low : high + 1])
    return chosen[0] if axis is None else chosen


def _lost_beyond(rows: Tensor, limit: float) -> Tensor:
    """Sum of (|x| - limit)^2 over the elements of each row, (C, n), that are larger: (C,), float64."""
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    for part in rows.split(max(1, _SEARCH_CHUNK // rows.shape[0]), dim=1):
        total += part.abs().sub_(limit).clamp_(min=0).double().square_().sum(1)
    return total


def smallest_error(errors: Tensor, candidates: Sequence[int]) -> Tensor:
    """The one of the rising `candidates` (K) with the least of `errors`, (K,) or (K, C); the smallest d wins ties."""
    # argmin does not promise the first of equal minima: ask for the first place that equals the minimum.
    first = (errors == errors.min(dim=0, keepdim=True).values).to(torch.int8).argmax(dim=0)
    return torch.tensor(candidates, dtype=torch.int32, device=errors.device)[first]


def check_sparsity(sparsity: float) -> float:
    """`sparsity` as a fraction in [0, 1), or a UserError."""
    if not 0.0 <= sparsity < 1.0:
        raise UserError(f"sparsity={sparsity!r} is not in [0, 1); type for example sparsity=0.5 to prune one half")
    return float(sparsity)


def magnitude_mask(score: Tensor, sparsity: float, rule: str = "exact") -> Tensor:
    """The mask of Eq. 4 and 8: 0 where `score` (|w|, or the window's sum of |f|) is among the smallest, else 1.

    rule `exact`: exactly floor(s * n) zeros; among equal scores those with the smaller index go first, so that dead
    neurons cannot stop pruning. rule `threshold`: the authors' (spec 2.1), everything at or above the element of
    rank int(s * n - 1) stays, ties included. Returns a bool tensor of score's shape.
    """
    check_sparsity(sparsity)
    one_of("rule", rule, MASK_RULES)
    flat = score.detach().flatten()
    count = math.floor(sparsity * flat.numel())
    if rule == "threshold":
        rank = max(int(sparsity * flat.numel() - 1), 0)
        return score >= smallest(flat, rank)[0]
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    [threshold] = smallest(flat, count - 1)
    pruned = flat < threshold
    equal = (flat == threshold).nonzero().flatten()
    pruned[equal[: count - int(pruned.sum())]] = True
    return ~pruned.view(score.shape)


def prune(x: Tensor, mask: Tensor, in_place: bool = False) -> Tensor:
    """P_u (Eq. 3): x * mask, the mask (of x's type, or float32) broadcast over leading dimensions.

    in_place: the result takes the place of x; autograd raises if x is needed elsewhere.
    """
    done = nodes.prune(x, mask, in_place)
    if done is not None:
        return done
    return x.mul_(mask.to(x.dtype)) if in_place else x * mask.to(x.dtype)
