"""Features that lie on a quantizer's grid, kept for the backward pass as integers: a quarter of the memory at 8 bits.

What a layer keeps for its gradient (ReLU its result, a convolution its input) is packed if every value lies on the
grid of the feature that was quantized last, and unpacked when the gradient needs it. Whether it does is looked at, not
assumed, so gradients are the same bits; what does not lie on the grid is kept as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from qprune.compression.fake_quantize import powers

_SMALLEST = 1 << 12  # elements; below, packing costs more than it saves

# The grid of the feature that was quantized last (decimal, bounds) while features are packed, else None.
_last: list[Any] | None = None


def in_use() -> bool:
    """Whether features are being packed."""
    return _last is not None


def remember(decimal: Tensor, bounds: tuple[int, int]) -> None:
    """Note the grid of a feature that was just quantized, if features are being packed."""
    if _last is not None:
        _last[:] = [(decimal, bounds)]


@dataclass(eq=False)
class _Packed:
    """A tensor as integers: x = integers * 2^-decimal."""

    integers: Tensor
    decimal: Tensor | int

    def unpacked(self) -> Tensor:
        values = self.integers.to(torch.float32)
        return values.mul_(powers(self.decimal, values, None)[1])


@dataclass(eq=False)
class _Known:
    """What was packed of a storage that may still be alive: ReLU and the next convolution keep the same tensor."""

    storage: StorageWeakRef
    version: int
    strides: tuple[int, ...]
    packed: _Packed


@contextmanager
def packed_features() -> Iterator[None]:
    """Around a training step, forward and backward: pack what is kept between the two."""
    global _last
    known: dict[int, _Known] = {}
    before, _last = _last, []

    def pack(x: Tensor) -> Any:
        if not _last or x.dtype != torch.float32 or x.numel() < _SMALLEST or isinstance(x, nn.Parameter):
            return x
        met = known.get(x.data_ptr())
        if met and not met.storage.expired() and (met.version, met.strides) == (x._version, x.stride()):
            return met.packed
        decimal, (low, high) = _last[0]
        scale, step = powers(decimal, x, None)
        some = x[:1, :1] if x.dim() > 1 else x[:64]
        if not torch.equal((some * scale).round_().clamp_(low, high).mul_(step), some):  # most tensors end here
            return x
        packed = _Packed((x * scale).clamp_(low, high).to(torch.int8 if high < 128 else torch.int16), decimal)
        if not torch.equal(packed.unpacked(), x):
            return x
        known[x.data_ptr()] = _Known(StorageWeakRef(x.untyped_storage()), x._version, x.stride(), packed)
        return packed

    def unpack(kept: Any) -> Any:
        return kept.unpacked() if isinstance(kept, _Packed) else kept

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _last = before
