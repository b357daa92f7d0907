"""Steps on features stored as uint8: what onnxruntime carries out in integers.

PyTorch holds the whole numbers n as float32, ONNX n + zero as uint8: zero is 0 where nothing is negative, else 128. The
nodes written are plain ONNX with QuantizeLinear and DequantizeLinear; the runtime fuses them into integer kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

from qprune.export.floats import convolve, fitted, write_layer, written_mask
from qprune.export.program import Grid
from qprune.export.writer import SIGNED_RANGE, Writer

BYTE = 255
Form = Literal["signed", "unsigned", "either"]  # of a weight's bytes; either: as the CPU that loads the file needs it
FORMS: dict[str, Form] = {"auto": "either", "safe": "unsigned", "signed": "signed"}  # by --weights, if `needs_unsigned`


@dataclass
class Store:
    """float32 to uint8: nearest, ties to even, within the grid."""

    grid: Grid
    zero: int

    def run(self, x: Tensor) -> Tensor:
        return (x * 2.0**self.grid.decimal).round_().clamp_(self.grid.low, self.grid.high)

    def write(self, graph: Writer, x: str) -> str:
        return within(graph, graph.quantized(x, self.grid.decimal, self.zero), self.grid, self.zero)


@dataclass
class Load:
    """uint8 to the float32 that it stands for."""

    grid: Grid
    zero: int

    def run(self, x: Tensor) -> Tensor:
        return x * 2.0**-self.grid.decimal

    def write(self, graph: Writer, x: str) -> str:
        return graph.dequantized(x, self.grid.decimal, self.zero)


def within(graph: Writer, x: str, grid: Grid, zero: int) -> str:
    """Clip uint8 to the grid where the type does not already."""
    low, high = grid.low + zero, grid.high + zero
    if low > 0:
        x = graph.node("Max", x, graph.constant(low, "uint8"))
    return graph.node("Min", x, graph.constant(high, "uint8")) if high < BYTE else x


@dataclass
class StoredLayer:
    """A layer from uint8 to uint8: clip(round((sums + bias) * factor)), the factor by output channel in float32.

    weight: whole numbers of 8 bits, (out, ...). scale: float32 (out,), what one of them stands for, the norm's factor
    included and perhaps negative. bias: int32 (out,), in units of the input's step times scale. form: of the weight's
    bytes; see `needs_unsigned`. wide: sums may not fit float32, so PyTorch needs float64.
    """

    op: str
    weight: Tensor
    scale: Tensor
    bias: Tensor
    arguments: dict[str, Any]
    source: Grid
    source_zero: int
    made: Grid
    zero: int
    bits: int
    form: Form
    wide: bool
    clipped_later: bool = False  # a mask of this grid follows, which keeps its ends too

    def run(self, x: Tensor) -> Tensor:
        form = torch.float64 if self.wide else torch.float32
        sums = convolve(self.op, x.to(form), self.weight.to(form), None, self.arguments).double()
        shape = (-1, *[1] * (sums.dim() - 2))
        # onnxruntime's order: one float32 factor from three scales, of which two are powers of two
        factor = (self.scale * 2.0**-self.source.decimal) / torch.tensor(2.0**-self.made.decimal)
        real = (sums + self.bias.double().view(shape)).float() * factor.view(shape)
        return real.round_().clamp_(self.made.low, self.made.high)

    def write(self, graph: Writer, x: str) -> str:
        scale = graph.constant(self.scale, "float32")

        def real_weight(stored: str, zero: int, kind: str) -> str:
            zeros = graph.constant(torch.full_like(self.bias, zero), kind)
            return graph.node("DequantizeLinear", stored, scale, zeros, axis=0)

        step = graph.constant(2.0**-self.source.decimal, "float32")
        inputs = [
            graph.dequantized(x, self.source.decimal, self.source_zero),
            on_bytes(graph, self.weight, self.bits, self.form, real_weight, TensorProto.FLOAT, self.weight.shape),
            graph.node("DequantizeLinear", graph.constant(self.bias, "int32"), graph.node("Mul", scale, step), axis=0),
        ]
        real = write_layer(graph, self.op, inputs, self.arguments)
        whole = graph.quantized(real, self.made.decimal, self.zero)
        return whole if self.clipped_later else within(graph, whole, self.made, self.zero)


def on_bytes(
    graph: Writer, weight: Tensor, bits: int, form: Form, write: Callable[[str, int, str], str], kind: int, shape: Any
) -> str:
    """What `write` makes of a weight's bytes, their zero point and numpy type: a value of ONNX type `kind`.

    Bytes are signed, or unsigned with an offset; 4 bits in the file where that is enough. Of a weight in either form
    the file holds signed bytes.
    """
    if form == "unsigned":
        return write(graph.bytes(weight + SIGNED_RANGE, "uint8", SIGNED_RANGE), SIGNED_RANGE, "uint8")
    stored = graph.integers(weight, bits, "INT8")
    if form == "signed":
        return write(stored, 0, "int8")
    return graph.either(
        graph.adds_bytes_exactly(),
        lambda: write(stored, 0, "int8"),
        lambda: write(graph.with_offset(stored), SIGNED_RANGE, "uint8"),
        kind,
        shape,
    )


def needs_unsigned(weight: Tensor, largest_stored: int) -> bool:
    """Whether a CPU may have to get the weight as uint8 so that all add alike.

    Without its VNNI instructions a CPU adds two products of a byte (at most `largest_stored`) and a signed byte in
    16 bits, which saturate; onnxruntime then answers wrongly, and without a word. Any two of a row's weights may meet.
    """
    rows = weight.flatten(1)
    if rows.shape[1] == 1:
        return False
    top = rows.topk(2, dim=1).values.clamp(min=0).sum(1).max()
    bottom = rows.topk(2, dim=1, largest=False).values.clamp(max=0).sum(1).min()
    return bool(max(int(top) * largest_stored - 32767, -int(bottom) * largest_stored - 32768) > 0)


@dataclass
class IntegerSums:
    """A linear layer from uint8 to its exact sums (bias included) in float32: where no grid follows."""

    weight: Tensor
    bias: Tensor | None
    source: Grid
    source_zero: int
    decimals: Tensor
    form: Form

    def run(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * self._steps()

    def _steps(self) -> Tensor:
        """What one whole number of each output channel stands for: (out,) or (1,)."""
        return torch.exp2(-(self.decimals + self.source.decimal).float())

    def write(self, graph: Writer, x: str) -> str:
        zero = graph.constant(self.source_zero, "uint8")

        def exact_sums(stored: str, offset: int, kind: str) -> str:
            return graph.node("MatMulInteger", x, stored, zero, graph.constant(offset, kind))

        shape = ["batch", len(self.weight)]
        sums = on_bytes(graph, self.weight.T, 8, self.form, exact_sums, TensorProto.INT32, shape)
        if self.bias is not None:
            sums = graph.node("Add", sums, graph.constant(self.bias, "int32"))
        return graph.node("Mul", graph.node("Cast", sums, to=TensorProto.FLOAT), graph.constant(self._steps()))


@dataclass
class StoredMask:
    """Eq. 3 on uint8."""

    mask: Tensor
    border: str
    dynamic: bool
    grid: Grid
    zero: int

    def run(self, x: Tensor) -> Tensor:
        return x * fitted(self.mask, tuple(x.shape[2:]), self.border)

    def write(self, graph: Writer, x: str) -> str:
        mask = written_mask(graph, self.mask, self.border, x if self.dynamic else None)
        if self.zero == 0 or not self.dynamic:  # a masked element lies between zero and zero, any other on the grid
            kept, none = graph.node("Cast", mask, to=TensorProto.BOOL), graph.constant(self.zero, "uint8")
            ends = (("Min", self.grid.high), ("Max", self.grid.low)) if self.zero else (("Min", self.grid.high),)
            for op, end in ends:
                x = graph.node(op, x, graph.node("Where", kept, graph.constant(end + self.zero, "uint8"), none))
            return x
        product = graph.node("Mul", graph.dequantized(x, self.grid.decimal, self.zero), graph.dequantized(mask, 0, 0))
        return graph.quantized(product, self.grid.decimal, self.zero)


@dataclass
class StoredAdd:
    """The sum of two stored features on a grid of its own: nearest, ties to even; exact until it is rounded."""

    grids: tuple[Grid, Grid]
    zeros: tuple[int, int]
    made: Grid
    zero: int

    def run(self, x: Tensor, y: Tensor) -> Tensor:
        total = x * 2.0 ** -self.grids[0].decimal + y * 2.0 ** -self.grids[1].decimal
        return (total * 2.0**self.made.decimal).round_().clamp_(self.made.low, self.made.high)

    def write(self, graph: Writer, x: str, y: str) -> str:
        real = [graph.dequantized(v, g.decimal, z) for v, g, z in zip((x, y), self.grids, self.zeros, strict=True)]
        total = graph.quantized(graph.node("Add", *real), self.made.decimal, self.zero)
        return within(graph, total, self.made, self.zero)


@dataclass
class StoredRelu:
    """ReLU of stored features."""

    zero: int

    def run(self, x: Tensor) -> Tensor:
        return x.relu()

    def write(self, graph: Writer, x: str) -> str:
        return graph.node("Max", x, graph.constant(self.zero, "uint8"))
