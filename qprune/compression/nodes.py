"""The operators as nodes of torch's autograd engine (nodes.cpp): no Python between two layers, and the same bits.

In use where they have been built (`node_cache`) and where the kernels that they call are.
"""

from __future__ import annotations

import ctypes
import importlib.util
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qprune.compression import native as kernels
from qprune.compression import node_cache
from qprune.compression.distributed import rank_and_world

# Functions of kernels.c, in the order in which nodes.cpp is given their addresses.
_KERNELS = ("quantize", "clip_gradient", "clip_rectified", "changes_gradient", "multiply", "clip_before_tanh")

_operate: Any = None


def load() -> bool:
    """Use in this process what has been built, if it is not in use yet; whether it is."""
    global _operate
    if _operate is None and kernels.in_use() and (built := node_cache.built()) is not None:
        _operate = loaded(built)
    return _operate is not None


def quantize(
    x: Tensor,
    decimal: Tensor | int,
    axis: int | None,
    bounds: tuple[int, int],
    rounding: str,
    mask: Tensor | None,
    in_place: bool,
    rectify: bool,
    sole_reader: bool,
) -> Tensor | None:
    """As `kernels.quantize`, with the gradient of Eq. 2 (`clip_value`); None where no node fits.

    sole_reader: nobody else reads x. Then if x is the output of a tanh, the gradient of both is one pass.
    """
    if _operate is None or not _may_be_used() or isinstance(decimal, int) or rank_and_world()[1] > 1:
        return None  # several ranks clip the sum of their gradients
    number = kernels.ROUNDING_NUMBERS[rounding]
    out: Tensor | None = _operate(x, mask, decimal, axis, *bounds, number, in_place, rectify, sole_reader)
    return out


def prune(x: Tensor, mask: Tensor, in_place: bool) -> Tensor | None:
    """Eq. 3, x * mask, with its gradient; None where no node fits."""
    if _operate is None or not _may_be_used():
        return None
    out: Tensor | None = _operate(x, mask, None, None, 0, 0, 0, in_place, False, False)
    return out


def _may_be_used() -> bool:
    return kernels.in_use() and not torch.compiler.is_compiling()


def loaded(path: Path) -> Any:
    """The function of the built file that makes nodes."""
    loader = ExtensionFileLoader("qprune_nodes", str(path))
    spec = importlib.util.spec_from_loader("qprune_nodes", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    library = kernels.library()
    addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in _KERNELS]
    module.use(*addresses, _tanh_contracted())
    return module.operate


def _tanh_contracted() -> int:
    """Whether torch contracts 1 - v * v in the gradient of a tanh, as `clip_before_tanh` is told it; -1: neither."""
    result, grad = torch.linspace(-1, 1, 4001), torch.linspace(-3, 5, 4001)
    expected, found = torch.ops.aten.tanh_backward(grad, result), torch.empty_like(grad)
    d = torch.tensor(0, dtype=torch.int32)
    for contracted in (1, 0):
        kernels.library().clip_before_tanh(
            *(each.data_ptr() for each in (grad, result)),
            None,
            found.data_ptr(),
            1,
            len(grad),
            d.data_ptr(),
            -128,
            127,
            contracted,
        )
        if torch.equal(found, expected):
            return contracted
    return -1
