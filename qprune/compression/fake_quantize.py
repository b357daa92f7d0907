"""Quantization as a function with a gradient: forward and backward of Eq. 1 to 3 in as few passes as can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qprune.compression import native as kernels
from qprune.compression import nodes
from qprune.compression.distributed import batch_share, of_whole_batch
from qprune.errors import UserError


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


def _round(x: Tensor, rounding: str, in_place: bool = True) -> Tensor:
    """Round, one of ROUNDINGS; `in_place`: the result takes the place of x."""
    if rounding == "floor":
        return x.floor_() if in_place else x.floor()
    if rounding == "nearest":
        return x.round_() if in_place else x.round()
    # torch's trunc is not vectorised on a CPU and costs 30 times a copy; x minus its fraction is exact and costs 3.
    # A compiler's is one instruction.
    if x.is_cuda or torch.compiler.is_compiling():
        return x.trunc_() if in_place else x.trunc()
    return x.sub_(x.frac()) if in_place else x - x.frac()


def _as_expression(ctx: Any, x: Tensor, factor: Any, step: Any, rounding: str) -> Tensor:
    """The forward pass for a compiler, which needs no work in place to fuse it: torch 2.11 loses gradients at that."""
    low, high = ctx.bounds
    out: Tensor = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x) * factor
    if ctx.gradient == "in_range":
        rounded = _round(out, rounding, in_place=False)
        ctx.save_for_backward((rounded >= low) & (rounded <= high))
    quantized: Tensor = _round(out.clamp(low, high), rounding, in_place=False) * step
    return quantized


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
        of_samples: bool,
        rectify: bool,
    ) -> Tensor:
        low, high = bounds
        ctx.of_samples, ctx.rectify = of_samples, rectify
        ctx.gradient, ctx.bounds, ctx.dtype, ctx.axis, ctx.decimal = gradient, bounds, x.dtype, axis, decimal
        ctx.mask = (
            mask  # as the decimals, no result and no input that has a gradient: it need not be saved for autograd
        )
        if in_place:
            ctx.mark_dirty(x)
        if gradient != "in_range" and not torch.compiler.is_compiling():
            out = kernels.quantize(x, decimal, axis, bounds, rounding, mask, in_place, rectify)
            if out is not None:
                if rectify:
                    ctx.save_for_backward(out)
                return out
        scale, step = powers(decimal, x, axis)
        factor = scale if mask is None else mask * scale
        if torch.compiler.is_compiling():
            return _as_expression(ctx, x, factor, step, rounding)
        if x.dtype in (torch.float16, torch.bfloat16):
            out = x.float().mul_(factor)
        else:
            out = x.mul_(factor) if in_place else x * factor
        if gradient == "in_range":
            rounded = _round(out.clone(), rounding)
            ctx.save_for_backward((rounded >= low) & (rounded <= high))
        # The bounds are whole numbers, so clamping first gives the same, and infinities never reach the rounding.
        out = _round(out.clamp_(low, high), rounding).mul_(step)
        if rectify:
            ctx.save_for_backward(out.relu_())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, high = ctx.bounds
        decimal, mask = ctx.decimal, ctx.mask
        if ctx.rectify:
            [result] = ctx.saved_tensors
            if batch_share() == 1.0 and not torch.is_grad_enabled():
                clipped = kernels.clip_rectified(grad, result, decimal, ctx.bounds, mask)
                if clipped is not None:
                    return clipped.to(ctx.dtype), *[None] * 9
            grad = torch.ops.aten.threshold_backward(grad, result, 0)
        if ctx.gradient == "clip_value":
            # The one gradient that is not linear: it must see what one process would, which has the whole batch.
            grad = of_whole_batch(grad, ctx.of_samples)
            clipped = None
            # with gradients on, somebody wants the gradient of this gradient, which only torch's functions have
            if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
                clipped = kernels.clip_gradient(grad, decimal, ctx.axis, ctx.bounds, mask)
            if clipped is None:
                step = powers(decimal, grad, ctx.axis)[1]
                clipped = torch.clamp(grad, low * step, high * step)
                clipped = clipped if mask is None else clipped.mul_(mask)  # in place: the clamped gradient is ours
            share = batch_share() if ctx.of_samples else 1.0
            grad = clipped if share == 1.0 else clipped / share
        elif ctx.gradient == "in_range":
            grad = grad * ctx.saved_tensors[0]
            grad = grad if mask is None else grad.mul_(mask)
        elif mask is not None:
            grad = grad * mask
        return grad.to(ctx.dtype), *[None] * 9


def quantize_checked(
    x: Tensor,
    bounds: tuple[int, int],
    decimal: int | Tensor,
    rounding: str,
    gradient: str,
    axis: int | None,
    mask: Tensor | None,
    in_place: bool,
    of_samples: bool = True,
    rectify: bool = False,
    sole_reader: bool = False,
) -> Tensor:
    """`quantize` with arguments that are known to be right: `bounds` of `integer_range`, decimal an int or int32.

    of_samples: False for a weight, which all ranks have alike. rectify: with the ReLU that reads the result, in the
    same passes; for the gradient `clip_value`. sole_reader: nobody else reads x.
    """
    if gradient == "clip_value":
        done = nodes.quantize(x, decimal, axis, bounds, rounding, mask, in_place, rectify, sole_reader)
        if done is not None:
            return done
    kind = x.dtype
    in_place = in_place and (kind is torch.float32 or kind is torch.float64)
    out: Tensor = _Quantize.apply(x, decimal, axis, bounds, rounding, gradient, mask, in_place, of_samples, rectify)
    if kind is torch.float32 or kind is torch.float64:
        return out
    return out.to(working_dtype(kind, bounds[1].bit_length() + 1))


def powers(decimal: Tensor | int, x: Tensor, axis: int | None) -> tuple[Tensor | float, Tensor | float]:
    """2^d and 2^-d, as tensors that broadcast with x where d is one."""
    if not isinstance(decimal, Tensor):
        return 2.0**decimal, 2.0**-decimal
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    decimal = shaped_along(decimal, x, axis)
    return power_of_two(decimal, work), power_of_two(-decimal, work)


def shaped_along(decimal: Tensor, x: Tensor, axis: int | None) -> Tensor:
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
