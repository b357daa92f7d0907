"""Steps on floats: those that both sides carry out alike to the last bit, and those that only agree nearly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

from qprune.compression.fake_quantize import power_of_two
from qprune.compression.functional import quantize
from qprune.compression.pruner import tile_mask
from qprune.export.program import Grid
from qprune.export.weights import Weight
from qprune.export.writer import TYPES, Writer

TORCH_TYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass
class Cast:
    """To float32 or float64."""

    form: str

    def run(self, x: Tensor) -> Tensor:
        return x.to(TORCH_TYPES[self.form])

    def write(self, graph: Writer, x: str) -> str:
        return graph.node("Cast", x, to=TYPES[self.form])


@dataclass
class Round:
    """To a grid (Eq. 1) with any of the roundings; the result is still a float."""

    grid: Grid
    bits: int
    rounding: str
    form: str

    def run(self, x: Tensor) -> Tensor:
        return quantize(x, self.bits, self.grid.decimal, self.rounding)

    def write(self, graph: Writer, x: str) -> str:
        def number(value: float) -> str:
            return graph.constant(value, self.form)

        scaled = graph.node("Mul", x, number(2.0**self.grid.decimal))
        inside = graph.node("Clip", scaled, number(self.grid.low), number(self.grid.high))
        if self.rounding == "trunc":  # a cast to integers truncates; what is inside the grid fits
            whole = graph.node("Cast", graph.node("Cast", inside, to=TensorProto.INT32), to=TYPES[self.form])
        else:
            whole = graph.node({"floor": "Floor", "nearest": "Round"}[self.rounding], inside)
        return graph.node("Mul", whole, number(2.0**-self.grid.decimal))


def fitted(mask: Tensor, size: tuple[int, ...], border: str) -> Tensor:
    """The mask for a feature whose places are of `size`."""
    return mask if mask.shape[1:] in (size, (1,) * len(size)) else tile_mask(mask, size, border)


def written_mask(graph: Writer, mask: Tensor, border: str, like: str | None) -> str:
    """A mask (C, h, w) as uint8, laid out over the height and width of the value `like` if one is given."""
    name = graph.mask(mask)
    if like is None or all(n == 1 for n in mask.shape[1:]):
        return name
    shape = graph.node("Shape", like)
    for axis in reversed(range(1, mask.dim())):  # the last one first: rows are then copied as they are
        tile = graph.constant([mask.shape[axis]], "int64")
        length = graph.node("Gather", shape, graph.constant([axis + 1], "int64"))
        whole = graph.node("Mul", graph.node("Div", length, tile), tile)
        rest = graph.node(
            "Sub", length, graph.node("Where", graph.node("Greater", whole, graph.constant([0], "int64")), whole, tile)
        )
        # half of what is left over, rounded down: negative where the map is smaller than the mask
        two = graph.constant([2], "int64")
        offset = graph.node("Div", graph.node("Sub", rest, graph.node("Mod", rest, two)), two)
        scalar = graph.node("Squeeze", length)
        position = graph.node(
            "Sub", graph.node("Range", graph.constant(0, "int64"), scalar, graph.constant(1, "int64")), offset
        )
        name = graph.node("Gather", name, graph.node("Mod", position, tile), axis=axis)
        if border == "keep":
            before = graph.node("Less", position, graph.constant([0], "int64"))
            outside = graph.node("Or", before, graph.node("GreaterOrEqual", position, whole))
            sizes = [1] * mask.dim()
            sizes[axis] = -1
            name = graph.node(
                "Where", graph.node("Reshape", outside, graph.shape(sizes)), graph.constant(1, "uint8"), name
            )
    return name


@dataclass
class Mask:
    """Eq. 3 on floats."""

    mask: Tensor
    border: str
    dynamic: bool
    form: str

    def run(self, x: Tensor) -> Tensor:
        return x * fitted(self.mask, tuple(x.shape[2:]), self.border).to(x.dtype)

    def write(self, graph: Writer, x: str) -> str:
        mask = written_mask(graph, self.mask, self.border, x if self.dynamic else None)
        return graph.node("Mul", x, graph.node("Cast", mask, to=TYPES[self.form]))


@dataclass
class Layer:
    """A convolution, transposed convolution or linear layer on float32, its weight kept as integers if it has a grid.

    Where input and weight lie on grids and no sum can exceed 24 bits, every order of addition gives the same.
    """

    op: str
    weight: Weight | Tensor
    bias: Tensor | None
    arguments: dict[str, Any]

    def run(self, x: Tensor) -> Tensor:
        weight = self.weight.real if isinstance(self.weight, Weight) else self.weight
        return convolve(self.op, x, weight, self.bias, self.arguments)

    def write(self, graph: Writer, x: str) -> str:
        inputs = [x, _written_weight(graph, self.weight)]
        if self.bias is not None:
            inputs.append(graph.constant(self.bias, "float32"))
        return write_layer(graph, self.op, inputs, self.arguments)


def _written_weight(graph: Writer, weight: Weight | Tensor) -> str:
    if isinstance(weight, Tensor):
        return graph.constant(weight, "float32")
    return graph.node(
        "Mul",
        graph.integers(weight.integers, weight.bits, "FLOAT"),
        graph.constant(power_of_two(-weight.decimal), "float32"),
    )


def convolve(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, arguments: dict[str, Any]) -> Tensor:
    """The layer in PyTorch, in x's type."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if op == "linear":
        return F.linear(x, weight, bias)
    if op == "conv":
        return F.conv2d(x, weight, bias, **{k: arguments[k] for k in ("stride", "padding", "dilation", "groups")})
    names = ("stride", "padding", "output_padding", "groups", "dilation")
    return F.conv_transpose2d(x, weight, bias, **{k: arguments[k] for k in names})


def write_layer(graph: Writer, op: str, inputs: list[str], arguments: dict[str, Any]) -> str:
    """The ONNX node of a layer; inputs: x, weight and perhaps bias."""
    if op == "linear":
        return graph.node("Gemm", *inputs, transB=1)
    pads = list(arguments["padding"])
    places = {"strides": arguments["stride"], "dilations": arguments["dilation"], "group": arguments["groups"]}
    if op == "conv":
        return graph.node("Conv", *inputs, pads=pads + pads, **places)
    outer = {"output_padding": arguments["output_padding"]} if any(arguments["output_padding"]) else {}
    return graph.node("ConvTranspose", *inputs, pads=pads + pads, **places, **outer)


@dataclass
class Affine:
    """x * factor + shift by channel, each rounded on its own."""

    factor: Tensor | None
    shift: Tensor | None
    form: str
    rank: int

    def run(self, x: Tensor) -> Tensor:
        for value, multiply in ((self.factor, True), (self.shift, False)):
            if value is not None:
                shaped = value.to(x.dtype).view(-1, *[1] * (x.dim() - 2))
                x = x * shaped if multiply else x + shaped
        return x

    def write(self, graph: Writer, x: str) -> str:
        for value, op in ((self.factor, "Mul"), (self.shift, "Add")):
            if value is not None:
                shaped = value if self.rank == 2 else value.view(-1, *[1] * (self.rank - 2))
                x = graph.node(op, x, graph.constant(shaped, self.form))
        return x
