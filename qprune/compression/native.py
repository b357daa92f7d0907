"""Fake quantization in one pass on a CPU: csrc/fake_quantize.c, compiled when a process asks for it.

A C file and ctypes rather than `torch.utils.cpp_extension`: it compiles in half a second instead of half a minute, and
needs neither torch's headers nor ninja nor a cache on disk. Another process loads and calls it first, since a library
may end its process. Where it cannot be used (no C compiler, a GPU, another dtype or memory layout) `fake_quantize`
computes the same bits with torch's functions, in five passes.
"""

from __future__ import annotations

import ctypes
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
from torch import Tensor

_SOURCE = Path(__file__).parent / "csrc" / "fake_quantize.c"
# No contraction and no -ffast-math: the bits are those of torch. The object is linked without OpenMP's library, so that
# its threads are those of the library that torch has loaded, and torch.set_num_threads holds here too.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
_SECONDS = 60.0  # that a compiler may take
_KINDS = {"trunc": 0, "floor": 1, "nearest": 2, "clip": 3}

# Loads a library behind that of OpenMP, and calls it on 64 numbers.
_TRIAL = """
import sys
from ctypes import CDLL, RTLD_GLOBAL, c_float, c_int32, c_int64
path, *openmp = sys.argv[1:]
loaded = [CDLL(each, RTLD_GLOBAL) for each in openmp]
x, out, one = (c_float * 64)(*range(64)), (c_float * 64)(), c_int64(1)
CDLL(path).apply(x, None, out, one, c_int64(64), (c_int32 * 1)(2), one, one, c_float(-128), c_float(127), c_int32(0))
print("called")
"""

_library: Any = None
_refused = False  # whether the operator cannot be used here, which is said once


def load() -> bool:
    """Compile the operator and use it in this process; return whether it is in use.

    Call `fake_quantize.use_native` instead, which also compares its bits with torch's.
    """
    global _library
    if _library is None and not _refused and sys.platform.startswith("linux"):
        try:
            _library = _compiled()
        except Exception as error:  # no compiler, one that fails, no temporary folder, or one that forbids execution
            refuse(str(error))
    return _library is not None


def unload() -> None:
    """Compute with torch's functions from now on."""
    global _library
    _library = None


def refuse(reason: str) -> None:
    """Unload the operator for good, with a warning."""
    global _refused
    unload()
    _refused = True
    warnings.warn(
        f"the native operator is not used ({reason}); torch's functions compute the same bits, more slowly",
        stacklevel=3,
    )


def in_use() -> bool:
    """Return whether this process computes with the native operator."""
    return _library is not None


@contextmanager
def disabled() -> Iterator[None]:
    """Compute everything with torch's functions inside this context."""
    global _library
    library, _library = _library, None
    try:
        yield
    finally:
        _library = library


def apply(
    kind: str, x: Tensor, decimal: Tensor, mask: Tensor | None, axis: int | None, bounds: tuple[int, int]
) -> Tensor | None:
    """Return Eq. 1 of x * mask, or for `kind` "clip" Eq. 2; None where the native operator does not fit.

    Args:
        kind: `trunc`, `floor` or `nearest`; or `clip`, with x the gradient.
        x, decimal, mask, axis, bounds: As in `fake_quantize`.
    """
    if _library is None or not _is_plain(x) or not decimal.is_cpu:
        return None
    rows, width = 1, x.numel()
    if mask is not None:
        if mask.dtype is not torch.float32 or not mask.is_cpu:
            return None
        skipped = x.dim() - mask.dim()
        if skipped not in (0, 1) or mask.shape != x.shape[skipped:] or mask.stride() != x.stride()[skipped:]:
            return None
        width = mask.numel()
        rows = x.numel() // width if width else 0
        if rows > 1 and x.stride(0) != width:
            return None
    channels = decimal.numel()
    if channels > 1 and (axis is None or rows > 1 or not decimal.is_contiguous()):
        return None
    inner = 1 if axis is None or channels == 1 else x.stride(axis)
    out = torch.empty_like(x)
    at_mask = None if mask is None else mask.data_ptr()
    sizes = (rows, width, decimal.data_ptr(), channels, inner)
    _library.apply(x.data_ptr(), at_mask, out.data_ptr(), *sizes, *bounds, _KINDS[kind])
    return out


def _is_plain(x: Tensor) -> bool:
    """Return whether x is a dense float32 tensor in this machine's memory, not of a subclass with its own functions."""
    return (
        x.dtype is torch.float32
        and x.is_cpu
        and type(x) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
        and (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)))
    )


def _compiled() -> Any:
    """Return the compiled source as a loaded library."""
    # CC may be several words, such as "ccache gcc".
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or ""]
    if not compiler[0]:
        raise FileNotFoundError("no C compiler: neither CC is set, nor is there cc or gcc")
    # A new folder with access for this user alone: no file of another user can be loaded, and processes that compile at
    # the same time do not collide.
    with tempfile.TemporaryDirectory(prefix="qprune-") as folder:
        part, whole = Path(folder, "fake_quantize.o"), Path(folder, "fake_quantize.so")
        _run([*compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(part)])
        _run([*compiler, "-shared", str(part), "-o", str(whole)])
        openmp = sorted(map(str, Path(torch.__file__).parent.glob("lib/libgomp*"))) or ["libgomp.so.1"]
        if "called" not in _run([sys.executable, "-I", "-S", "-c", _TRIAL, str(whole), *openmp]):
            raise RuntimeError("it ends the process that loads it")
        library = ctypes.CDLL(str(whole))  # stays mapped when the folder is removed
    pointer, count, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    library.apply.argtypes = [*[pointer] * 3, count, count, pointer, count, count, real, real, ctypes.c_int32]
    library.apply.restype = None
    return library


def _run(command: Sequence[str]) -> str:
    """Return what a command prints. Raises RuntimeError with the line that names its error."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{name}: no end after {_SECONDS:.0f} s") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines()
        why = next((line.strip() for line in lines if "rror" in line), f"exit code {done.returncode}")
        raise RuntimeError(f"{name}: {why}")
    return done.stdout.decode(errors="replace")
