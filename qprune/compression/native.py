"""The operators as one pass over memory each: kernels.c, compiled for this machine when a process asks for it.

Without them (no C compiler, a GPU, another type or layout) `functional` computes the same bits with torch's functions,
five passes for one. Nothing is kept on disk: compiling takes half a second.
"""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_SOURCE = Path(__file__).parent / "csrc" / "fake_quantize.c"
# No contraction and no -ffast-math: the bits are those of torch. Linked without OpenMP's library, so that its functions
# are those of the one that torch has loaded: one pool of threads, and torch.set_num_threads holds here too.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
ROUNDING_NUMBERS = {"trunc": 0, "floor": 1, "nearest": 2}
_SUMMED_BY_THEMSELVES = 8192  # elements: they stay in a near cache while each candidate is tried

_pointer, _count, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ON_TENSORS = (*(_pointer,) * 3, _count, _count, _pointer, _count, _count, _real, _real)

_ORDINARY = (Tensor, nn.Parameter, nn.Buffer)

_library: Any = None


def load() -> bool:
    """Compile the kernels, if that was not done, and use them in this process; whether they are in use.

    They are not where there is no compiler for them. A warning says so if they compile but do not compute what torch
    computes here.
    """
    global _library
    if _library is None:
        _library = _compiled()
        if _library is not None and not _agrees():
            _library = None
            warnings.warn("the compiled kernels do not compute what torch does here; they are not used", stacklevel=2)
    return _library is not None


def in_use() -> bool:
    """Whether this process computes with the kernels."""
    return _library is not None


def library() -> Any:
    """The loaded kernels, as functions of C; None while they are not in use."""
    return _library


@contextmanager
def unused() -> Iterator[None]:
    """Inside, all is computed by torch's functions."""
    global _library
    library, _library = _library, None
    try:
        yield
    finally:
        _library = library


def quantize(
    x: Tensor,
    decimal: Tensor | int,
    axis: int | None,
    bounds: tuple[int, int],
    rounding: str,
    mask: Tensor | None,
    in_place: bool,
    rectify: bool = False,
) -> Tensor | None:
    """Eq. 1 of x * mask, into x itself if `in_place`, with a ReLU behind if `rectify`; None where no kernel fits."""
    shape = _shape(x, decimal, axis, mask)
    if shape is None or (rectify and shape[3] > 1):
        return None
    out = x if in_place else torch.empty_like(x)
    at_mask = None if mask is None else mask.data_ptr()
    _library.quantize(x.data_ptr(), at_mask, out.data_ptr(), *shape, *bounds, ROUNDING_NUMBERS[rounding], rectify)
    return out


def clip_gradient(
    grad: Tensor, decimal: Tensor | int, axis: int | None, bounds: tuple[int, int], mask: Tensor | None
) -> Tensor | None:
    """Eq. 2: grad clamped to bounds * 2^-d, times mask, or grad itself if that is the same; None where none fits."""
    shape = _shape(grad, decimal, axis, mask)
    if shape is None:
        return None
    at, at_mask = grad.data_ptr(), None if mask is None else mask.data_ptr()
    if shape[3] == 1 and not _library.changes_gradient(at, at_mask, *shape[:3], *bounds):
        return grad
    out = torch.empty_like(grad)
    _library.clip_gradient(at, at_mask, out.data_ptr(), *shape, *bounds)
    return out


def clip_rectified(
    grad: Tensor, result: Tensor, decimal: Tensor | int, bounds: tuple[int, int], mask: Tensor | None
) -> Tensor | None:
    """Eq. 2 behind a ReLU that gave `result`, as `clip_gradient` of the ReLU's gradient; None where none fits."""
    shape = _shape(grad, decimal, None, mask)
    if shape is None or shape[3] > 1 or not _usable(result) or result.stride() != grad.stride():
        return None
    out, at_mask = torch.empty_like(grad), None if mask is None else mask.data_ptr()
    _library.clip_rectified(grad.data_ptr(), result.data_ptr(), at_mask, out.data_ptr(), *shape[:3], *bounds)
    return out


def add_magnitudes(x: Tensor, total: Tensor) -> bool:
    """total += sum over samples of |x|, x (B, ...) in float32 and total (...) in float64; False where it does not fit.

    torch sums columns in blocks (of four vectors where they lie side by side, else of four), and those that do not
    fill a block in another order.
    """
    if _library is None or total.dtype != torch.float64 or x.dim() < 2 or x.shape[0] == 0 or not _usable(x):
        return False
    if total.shape != x.shape[1:] or total.stride() != x.stride()[1:] or x.stride(0) != total.numel():
        return False
    wide = "AVX512" in torch.backends.cpu.get_cpu_capability()  # threads' shares are multiples of 16 columns
    side_by_side = 32 * torch.get_num_threads() if wide else 16
    whole = total.numel() % side_by_side == 0 if x.is_contiguous() else math.prod(x.shape[2:]) % 4 == 0
    if not whole:
        return False
    _library.add_magnitudes(x.data_ptr(), total.data_ptr(), x.shape[0], total.numel())
    return True


def squared_errors(x: Tensor, decimals: Sequence[int], bounds: tuple[int, int], rounding: str) -> Tensor | None:
    """Sum of (Q(x, d) - x)^2 over all of x for each d: (K,), float64; None where the kernel does not fit."""
    if _library is None or not _usable(x):
        return None
    candidates, count = torch.tensor(decimals, dtype=torch.int32), len(decimals)
    sums = torch.empty(1 + -(-x.numel() // _SUMMED_BY_THEMSELVES), count, dtype=torch.float64)
    over = x.numel(), _SUMMED_BY_THEMSELVES, candidates.data_ptr(), count
    _library.squared_errors(x.data_ptr(), sums.data_ptr(), *over, *bounds, ROUNDING_NUMBERS[rounding])
    return sums[0].clone()


def _usable(x: Tensor) -> bool:
    """Whether x is an ordinary float32 tensor in this machine's memory, without gaps."""
    return (
        x.dtype is torch.float32
        and x.is_cpu
        and type(x) in _ORDINARY
        and (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)))
    )


def _shape(
    x: Tensor, decimal: Tensor | int, axis: int | None, mask: Tensor | None
) -> tuple[int, int, Any, int, int] | None:
    """(rows, width, address of d, channels, inner) as in kernels.c, or None where the kernels do not fit.

    decimal: int32. This runs at every call of an operator, so it asks for as little as it can.
    """
    if _library is None or not _usable(x):
        return None
    rows, width = 1, x.numel()
    if mask is not None:
        if mask.dtype is not torch.float32 or not mask.is_cpu:
            return None
        if mask.dim() == x.dim() - 1:
            if mask.shape != x.shape[1:] or mask.stride() != x.stride()[1:]:
                return None
            width = mask.numel()
            rows = x.shape[0]
            if rows > 1 and x.stride(0) != width:
                return None
        elif mask.shape != x.shape or mask.stride() != x.stride():
            return None
    if isinstance(decimal, int):
        return rows, width, ctypes.byref(ctypes.c_int32(decimal)), 1, 1
    if not decimal.is_cpu:
        return None
    if decimal.dim() == 0 or decimal.numel() == 1:
        return rows, width, decimal.data_ptr(), 1, 1
    if axis is None or rows > 1 or not decimal.is_contiguous():
        return None
    return rows, width, decimal.data_ptr(), decimal.numel(), x.stride(axis)


def _compiled() -> Any:
    """kernels.c as a loaded library, or None where it cannot be made."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        # `CC` may be several words, such as "ccache gcc"
        compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or ""]
        # A new folder that only this user may enter: nobody else's file can be met or loaded, and processes that
        # compile at once do not meet either.
        with tempfile.TemporaryDirectory(prefix="qprune-") as folder:
            part, whole = Path(folder, "kernels.o"), Path(folder, "kernels.so")
            for command in (
                [*compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(part)],
                [*compiler, "-shared", str(part), "-o", str(whole)],
            ):
                subprocess.run(command, check=True, capture_output=True, timeout=60)
            library = ctypes.CDLL(str(whole))  # stays mapped when the folder is gone
    except (OSError, ValueError, subprocess.SubprocessError):
        return None  # no compiler, one that fails, no place for temporary files, or one that nothing may run from
    library.quantize.argtypes = [*_ON_TENSORS, ctypes.c_int32, ctypes.c_int32]
    library.clip_rectified.argtypes = [*(_pointer,) * 4, _count, _count, _pointer, _real, _real]
    library.clip_gradient.argtypes = list(_ON_TENSORS)
    library.changes_gradient.argtypes = [_pointer, _pointer, _count, _count, _pointer, _real, _real]
    library.clip_before_tanh.argtypes = [*library.clip_rectified.argtypes, ctypes.c_int32]
    library.multiply.argtypes = [*(_pointer,) * 3, _count, _count]
    library.add_magnitudes.argtypes = [_pointer, _pointer, _count, _count]
    library.squared_errors.argtypes = [*(_pointer,) * 2, *(_count,) * 2, _pointer, _count, _real, _real, ctypes.c_int32]
    of_gradients = ("clip_gradient", "clip_rectified", "clip_before_tanh")
    for name in ("quantize", "multiply", *of_gradients, "add_magnitudes", "squared_errors"):
        getattr(library, name).restype = None
    library.changes_gradient.restype = ctypes.c_int32
    return library


def _agrees() -> bool:
    """Whether the kernels give torch's bits on this machine, on a sample with every kind of number."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 16, 8, 8, generator=generator) * torch.logspace(-3, 6, 16)[:, None, None]
    x.view(-1)[:6] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, -0.3, 1e-42])
    mask = (torch.rand(16, 8, 8, generator=generator) > 0.5).float()
    scaled = (x * (mask * 8.0)).clamp(-128, 127)
    expected = {
        "trunc": scaled - scaled.frac(),
        "floor": scaled.floor(),
        "nearest": scaled.round(),
    }
    finite = torch.nan_to_num(x, 1.0, 2.0, 3.0)
    for rounding, rounded in expected.items():
        found = quantize(x, 3, None, (-128, 127), rounding, mask, in_place=False)
        if found is None or not _same_bits(found, rounded * 0.125):
            return False
        behind = quantize(x, 3, None, (-128, 127), rounding, mask, in_place=False, rectify=True)
        if behind is None or not _same_bits(behind, (rounded * 0.125).relu()):
            return False
        on_grids = [quantize(finite, d, None, (-128, 127), rounding, None, in_place=False) for d in (0, 3)]
        errors = squared_errors(finite, (0, 3), (-128, 127), rounding)
        sums = torch.stack([(q - finite).double().square().sum() for q in on_grids if q is not None])
        if errors is None or not torch.allclose(errors, sums, rtol=1e-12, atol=0):
            return False
    clipped = clip_gradient(x, 3, None, (-128, 127), mask)
    if clipped is None or not _same_bits(clipped, x.clamp(-16.0, 15.875) * mask):
        return False
    result = (rounded * 0.125).relu()
    passed = torch.ops.aten.threshold_backward(x, result, 0)
    clipped = clip_rectified(x, result, 3, (-128, 127), mask)
    if clipped is None or not _same_bits(clipped, passed.clamp(-16.0, 15.875) * mask):
        return False
    total = torch.zeros(16, 8, 8, dtype=torch.float64)
    wide = finite.pow(5)  # of so many magnitudes that the order of a sum shows
    if not add_magnitudes(wide, total):
        return False
    return torch.equal(total, wide.abs().sum(0, dtype=torch.float64))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, signs of zeros included; NaN equals NaN."""
    numbers = ~b.isnan()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[numbers].view(torch.int32), b[numbers].view(torch.int32))
