"""Fake quantization as one function with its own gradient: Eq. 1 and 3 forward, Eq. 2 backward.

Every step is an elementwise expression without work in place, so that `torch.compile` makes one pass of it. In eager
mode on a CPU, `native` computes the same bits in one pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qprune.compression import native
from qprune.compression.distributed import batch_share, of_whole_batch
from qprune.errors import UserError


class Grid(NamedTuple):
    """The grid that values are rounded to, but for its fraction bits d.

    Attributes:
        bits: N, from 2 to 16.
        rounding: `trunc`, `floor` or `nearest`.
        gradient: `clip_value`, `ste` or `in_range`.
        axis: The dimension with a d of its own per index, or None.
        of_samples: Whether dimension 0 holds samples. A weight has none, and is the same on all ranks.
    """

    bits: int
    rounding: str = "trunc"
    gradient: str = "clip_value"
    axis: int | None = None
    of_samples: bool = True

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest integer of the grid: (-2^(N-1), 2^(N-1) - 1)."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1


class FakeQuantize(torch.autograd.Function):
    """Eq. 1 and 3 forward, Eq. 2 backward: `FakeQuantize.apply(x, decimal, mask, grid)`.

    The mask is scaled by 2^d before x is multiplied by it: powers of two and a mask of 0 and 1 make every product
    exact, and one pass over x is saved. The clamp comes before the rounding, so that infinities never reach it; the
    bounds are whole numbers, so the result is the same.

    Args:
        x: Any shape and floating type.
        decimal: d, int32, 0-d or (C,) along `grid.axis`.
        mask: float32 of 0 and 1 that broadcasts with x, or None.
        grid: The rest of the grid; its values are not checked here.

    Returns:
        x * mask on the grid: a tensor of x's shape, in `working_dtype(x.dtype, grid.bits)`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, decimal: Tensor, mask: Tensor | None, grid: Grid) -> Tensor:
        ctx.dtype, ctx.decimal, ctx.mask, ctx.grid = x.dtype, decimal, mask, grid
        if grid.gradient != "in_range" and not torch.compiler.is_compiling():
            done = native.apply(grid.rounding, x, decimal, mask, grid.axis, grid.bounds)
            if done is not None:
                return done
        low, high = grid.bounds
        scale, step = powers(decimal, x, grid.axis)
        scaled = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x) * (
            scale if mask is None else mask * scale
        )
        if grid.gradient == "in_range":
            rounded = _round(scaled, grid.rounding)
            ctx.save_for_backward((rounded >= low) & (rounded <= high))
        out: Tensor = (_round(scaled.clamp(low, high), grid.rounding) * step).to(working_dtype(x.dtype, grid.bits))
        if not torch.compiler.is_compiling() and out.stride() != x.stride():
            # torch.clamp gives dimensions of size 1 other strides, by which a convolution chooses another layout and
            # other last bits than behind the native operator.
            out = torch.empty_like(x, dtype=out.dtype).copy_(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grid, mask = ctx.grid, ctx.mask
        if grid.gradient == "clip_value":
            # The one gradient that is not linear: it has to be that of the whole batch, as in a single process.
            share = batch_share() if grid.of_samples else 1.0
            grad = _clip(of_whole_batch(grad, grid.of_samples), ctx.decimal, mask, grid)
            grad = grad if share == 1.0 else grad / share
        else:
            if grid.gradient == "in_range":
                grad = grad * ctx.saved_tensors[0]
            grad = grad if mask is None else grad * mask
        return grad.to(ctx.dtype), None, None, None


def _clip(grad: Tensor, decimal: Tensor, mask: Tensor | None, grid: Grid) -> Tensor:
    """Clamp a gradient to the grid's range (Eq. 2 as the authors coded it, spec 1.2) and mask it."""
    # With gradients enabled, the gradient of this gradient is wanted, which only torch's functions have.
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        done = native.apply("clip", grad, decimal, mask, grid.axis, grid.bounds)
        if done is not None:
            return done
    low, high = grid.bounds
    step = powers(decimal, grad, grid.axis)[1]
    clipped = torch.clamp(grad, low * step, high * step)
    return clipped if mask is None else clipped * mask


def working_dtype(dtype: torch.dtype, bits: int) -> torch.dtype:
    """Return the type of results: the input's if it holds the whole grid, else float32.

    bfloat16 has 8 significant bits: it holds grids of up to 9 bits at any power-of-two scale, and no wider one.
    """
    if dtype == torch.float64 or (dtype == torch.bfloat16 and bits <= 9):
        return dtype
    return torch.float32


def power_of_two(exponent: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return 2^exponent for integers in [-126, 127], exact on every device."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32).to(dtype)


def powers(decimal: Tensor, x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Return 2^d and 2^-d, shaped to broadcast with x."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    decimal = shaped_along(decimal, x, axis)
    return power_of_two(decimal, work), power_of_two(-decimal, work)


def shaped_along(decimal: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Return `decimal` shaped to broadcast with x: unchanged when 0-d, else along `axis`.

    Raises:
        UserError: There is no axis of that size.
    """
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


def _round(x: Tensor, rounding: str) -> Tensor:
    if rounding == "floor":
        return x.floor()
    if rounding == "nearest":
        return x.round()
    # torch.trunc is not vectorised on a CPU and takes ten times as long; x minus its fraction is exact. It also turns
    # -0.3 into +0.0, on every device.
    return x - x.frac()


def use_native() -> bool:
    """Use the native operator in this process; return whether it is in use.

    A warning says once why it is not: it cannot be compiled or loaded, or does not give the bits of torch here.
    """
    if not native.in_use() and native.load() and not _bits_agree():
        native.refuse("it does not give torch's bits here")
    return native.in_use()


def _bits_agree() -> bool:
    """Return whether the native operator gives torch's bits on a sample with every kind of number."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 16, 8, 8, generator=generator) * torch.logspace(-3, 6, 16)[:, None, None]
    x.view(-1)[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, -0.3, 1e-42])
    mask = (torch.rand(16, 8, 8, generator=generator) > 0.5).float()
    decimals = torch.arange(16, dtype=torch.int32)

    def bits(grid: Grid, masked: Tensor | None) -> Tensor:
        leaf = x.clone().requires_grad_()
        out = FakeQuantize.apply(leaf, decimals[3] if grid.axis is None else decimals, masked, grid)
        [gradient] = torch.autograd.grad(out, leaf, x)
        both = torch.stack([out.detach(), gradient])
        return torch.where(both.isnan(), torch.nan, both).view(torch.int32)

    for rounding in ("trunc", "floor", "nearest"):
        for axis, masked in ((None, None), (None, mask), (1, None)):
            grid = Grid(8, rounding, axis=axis)
            found = bits(grid, masked)
            with native.disabled():
                expected = bits(grid, masked)
            if not torch.equal(found, expected):
                return False
    return True
