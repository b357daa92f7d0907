"""The paper's equations, one function each, on plain tensors.

Symbols as in the paper: x a weight or feature tensor, N = `bits`, d = `decimal` (binary digits right of the point),
s = `sparsity`, (q_l, q_u) = `saturate` as fractions. Where the paper and its authors' code differ, the default is the
code's behaviour and the paper's is an option (spec section 6).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from qprune.compression import kernels
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


def power_of_two(exponent: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """2^exponent for a tensor of integers in [-126, 127], exact on every device (built from the bits of a float32)."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32).to(dtype)


def working_dtype(dtype: torch.dtype, bits: int) -> torch.dtype:
    """The type that results are given in: that of the input if it can hold the whole grid, else float32.

    bfloat16 has 8 significant bits: it holds grids of up to 9 bits at any power-of-two scale, and no wider one.
    """
    if dtype == torch.float64 or (dtype == torch.bfloat16 and bits <= 9):
        return dtype
    return torch.float32


def _round(x: Tensor, rounding: str) -> Tensor:
    """Round in place, one of ROUNDINGS."""
    if rounding == "floor":
        return x.floor_()
    if rounding == "nearest":
        return x.round_()
    # torch's trunc is not vectorised on a CPU and costs 30 times a copy; x minus its fraction is exact and costs 3.
    return x.trunc_() if x.is_cuda else x.sub_(x.frac())


class _Quantize(torch.autograd.Function):
    """Eq. 1 forward, Eq. 2 backward, of x or of x * mask (Eq. 3) in the same passes over memory.

    Scaling the mask, which is small, saves a pass over x; powers of two and a mask of 0 and 1 make the result equal to
    the last bit. `in_place`: the result takes the place of x, whose maker must not need it for its own gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        decimal: Tensor | int,
        axis: int | None,
        bounds: tuple[int, int],
        rounding: str,
        gradient: str,
        mask: Tensor | None,
        in_place: bool,
    ) -> Tensor:
        low, high = bounds
        fixed = None if isinstance(decimal, Tensor) else decimal
        ctx.gradient, ctx.bounds, ctx.dtype, ctx.axis, ctx.decimal = gradient, bounds, x.dtype, axis, fixed
        if in_place:
            ctx.mark_dirty(x)
        out = None
        if gradient != "in_range":
            ctx.save_for_backward(None if fixed is not None else decimal, mask, None)
            if not torch.compiler.is_compiling():
                out = kernels.quantize(x, decimal, axis, bounds, rounding, mask, in_place)
        if out is not None:
            return out
        scale, step = powers(decimal, x, axis)
        factor = scale if mask is None else mask * scale
        if x.dtype in (torch.float16, torch.bfloat16):
            out = x.float().mul_(factor)
        else:
            out = x.mul_(factor) if in_place else x * factor
        if gradient == "in_range":
            rounded = _round(out.clone(), rounding)
            ctx.save_for_backward(None if fixed is not None else decimal, mask, (rounded >= low) & (rounded <= high))
        # The bounds are whole numbers, so clamping first gives the same, and infinities never reach the rounding.
        return _round(out.clamp_(low, high), rounding).mul_(step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, high = ctx.bounds
        decimal, mask, inside = ctx.saved_tensors
        decimal = ctx.decimal if decimal is None else decimal
        if ctx.gradient == "clip_value":
            clipped = None
            if not torch.compiler.is_compiling():
                clipped = kernels.clip_gradient(grad, decimal, ctx.axis, ctx.bounds, mask)
            if clipped is None:
                step = powers(decimal, grad, ctx.axis)[1]
                clipped = torch.clamp(grad, low * step, high * step)
                clipped = clipped if mask is None else clipped.mul_(mask)  # in place: the clamped gradient is ours
            grad = clipped
        elif ctx.gradient == "in_range":
            grad = grad * inside
            grad = grad if mask is None else grad.mul_(mask)
        elif mask is not None:
            grad = grad * mask
        return grad.to(ctx.dtype), *[None] * 7


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
        _along(decimal, x, axis)
    return quantize_checked(x, bounds, decimal, rounding, gradient, axis, mask, in_place)


def quantize_checked(
    x: Tensor,
    bounds: tuple[int, int],
    decimal: int | Tensor,
    rounding: str,
    gradient: str,
    axis: int | None,
    mask: Tensor | None,
    in_place: bool,
) -> Tensor:
    """`quantize` with arguments that are known to be right: `bounds` of `integer_range`, decimal an int or int32."""
    kind = x.dtype
    in_place = in_place and (kind is torch.float32 or kind is torch.float64)
    out: Tensor = _Quantize.apply(x, decimal, axis, bounds, rounding, gradient, mask, in_place)
    if kind is torch.float32 or kind is torch.float64:
        return out
    return out.to(working_dtype(kind, bounds[1].bit_length() + 1))


def powers(decimal: Tensor | int, x: Tensor, axis: int | None) -> tuple[Tensor | float, Tensor | float]:
    """2^d and 2^-d, as tensors that broadcast with x where d is one."""
    if not isinstance(decimal, Tensor):
        return 2.0**decimal, 2.0**-decimal
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    decimal = _along(decimal, x, axis)
    return power_of_two(decimal, work), power_of_two(-decimal, work)


def _along(decimal: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """`decimal` shaped to broadcast with x: as it is when 0-d, else along `axis`."""
    if decimal.dim() == 0:
        return decimal
    if axis is None or decimal.dim() != 1 or x.shape[axis] != decimal.numel():
        raise UserError(
            f"decimals of shape {tuple(decimal.shape)} need an axis of that size in x of shape {tuple(x.shape)}, "
            f"but axis={axis}"
        )
    shape = [1] * x.dim()
    shape[axis] = -1
    return decimal.view(shape)


def quantile(x: Tensor, fraction: float) -> Tensor:
    """The `fraction`-quantile of all elements of x, linearly interpolated, by selection: any size, no sorting."""
    flat = x.flatten()
    position = fraction * (flat.numel() - 1)
    below = math.floor(position)
    value = flat.kthvalue(below + 1).values
    if position > below:
        value = value + (flat.kthvalue(below + 2).values - value) * (position - below)
    return value


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
    total = torch.zeros(len(candidates), rows.shape[0], dtype=torch.float64, device=x.device)
    width = max(1, _SEARCH_CHUNK // rows.shape[0])
    for part in rows.split(width, dim=1):
        part = part if part.dtype == torch.float64 else part.float()
        for k, d in enumerate(candidates):
            difference = quantize(part, bits, d, rounding, "ste").sub_(part)
            total[k] += difference.double().square_().sum(1)
    return total[:, 0] if axis is None else total


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
    candidates = sorted(decimals)
    if not candidates or x.numel() == 0:
        raise UserError(f"no decimal can be chosen from {len(candidates)} candidates and {x.numel()} values")
    if not torch.isfinite(x).all():
        raise UserError("the values to choose decimal bits for are not all finite")
    low, high = check_saturate(saturate)
    errors = squared_errors(_saturate(x, low, high), bits, candidates, rounding, axis)
    return smallest_error(errors, candidates)


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
        return score >= flat.kthvalue(rank + 1).values
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    below, equal = flat < threshold, flat == threshold
    equal_to_prune = count - below.sum()
    pruned = below | (equal & (equal.cumsum(0) <= equal_to_prune))
    return ~pruned.view(score.shape)


def prune(x: Tensor, mask: Tensor, in_place: bool = False) -> Tensor:
    """P_u (Eq. 3): x * mask, the mask (of x's type, or float32) broadcast over leading dimensions.

    in_place: the result takes the place of x; autograd raises if x is needed elsewhere.
    """
    return x.mul_(mask.to(x.dtype)) if in_place else x * mask.to(x.dtype)
