"""Steps on features stored as uint8: QuantizeLinear and DequantizeLinear that onnxruntime fuses to integer kernels.

PyTorch holds the real numbers n * 2^-decimal, ONNX n + zero_point as uint8: the zero point is 0 where nothing is
negative, else 128.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

from qprune.export.float_steps import EXACT_BITS, FeatureMask, run_layer, write_layer
from qprune.export.onnx_graph import UINT8_OFFSET, GraphBuilder
from qprune.export.program import FixedPoint, Step, Value
from qprune.export.trace import Node

# Types of the bytes of a weight: chosen by the CPU that loads the file, uint8, or int8.
WEIGHT_TYPES = ("auto", "safe", "signed")


def rescale(graph: GraphBuilder, op: str, name: str, value: Value) -> str:
    """Add QuantizeLinear or DequantizeLinear between float32 and the uint8 of `value`."""
    return graph.node(
        op, name, graph.constant(value.on_grid.scale, "float32"), graph.constant(value.zero_point, "uint8")
    )


def saturate(graph: GraphBuilder, name: str, value: Value) -> str:
    """Clip uint8 to the ends of its grid, where the type does not."""
    low, high = value.on_grid.low + value.zero_point, value.on_grid.high + value.zero_point
    if low > 0:
        name = graph.node("Max", name, graph.constant(low, "uint8"))
    return graph.node("Min", name, graph.constant(high, "uint8")) if high < 255 else name


def quantize_feature(output: Value, *inputs: Value) -> Step:
    """Round a float32 value, or the sum of uint8 inputs, to uint8: nearest, ties to even."""
    grid = output.on_grid

    def run(x: Tensor, *others: Tensor) -> Tensor:
        whole = (sum(others, x) / grid.scale).round_()
        return whole.clamp_(grid.low, grid.high).mul_(grid.scale)

    def write(graph: GraphBuilder, *names: str) -> str:
        real = [rescale(graph, "DequantizeLinear", n, value) for n, value in zip(names, inputs, strict=False)]
        total = graph.node("Add", *real) if inputs else names[0]
        return saturate(graph, rescale(graph, "QuantizeLinear", total, output), output)

    return Step(run, write)


def mask_feature(mask: FeatureMask, x: Value) -> Step:
    """Multiply uint8 by a mask (Eq. 3) by clipping: masked elements to [0, 0], the others to the ends of the grid."""

    def write(graph: GraphBuilder, name: str) -> str:
        written, grid, zero = mask.write(graph, name), x.on_grid, x.zero_point
        if zero and mask.dynamic:
            ones = Value("mask", "uint8", (), FixedPoint(0, 0, 1))
            factors = [rescale(graph, "DequantizeLinear", *each) for each in ((name, x), (written, ones))]
            return rescale(graph, "QuantizeLinear", graph.node("Mul", *factors), x)
        kept, none = graph.node("Cast", written, to=TensorProto.BOOL), graph.constant(zero, "uint8")
        for op, end in [("Min", grid.high), ("Max", grid.low)][: 2 if zero else 1]:
            name = graph.node(op, name, graph.node("Where", kept, graph.constant(end + zero, "uint8"), none))
        return name

    return Step(lambda tensor: tensor * mask.tiled(tensor), write)


@dataclass(frozen=True)
class ScaledWeight:
    """The weight of an integer layer, with the factor of its batch norm folded into the scale.

    integers: float32 of 8-bit integers, (out, ...). scale: float32 (out,), may be negative. bias: int32 (out,), in
    units of the input's scale times `scale`. type: one of WEIGHT_TYPES; see
    `needs_unsigned`.
    """

    integers: Tensor
    scale: Tensor
    bias: Tensor | None
    bits: int
    type: str = "signed"


def integer_layer(node: Node, weight: ScaledWeight, x: Value, output: Value, masked: bool) -> Step:
    """Compute a layer from uint8 to uint8: clip(round((sums + bias) * factor)), one float32 factor per channel.

    masked: a mask that clips to the grid follows.
    """
    source, grid, units = x.on_grid, output.on_grid, weight.bias
    assert units is not None
    largest_sum = int(weight.integers.flatten(1).abs().sum(1).max()) * source.largest
    dtype = torch.float32 if largest_sum < 2**EXACT_BITS else torch.float64

    def run(tensor: Tensor) -> Tensor:
        sums = run_layer(node, tensor.to(dtype) / source.scale, weight.integers).double()
        shape = (-1, *[1] * (sums.dim() - 2))
        # onnxruntime's order: one float32 factor from three scales, of which two are powers of two
        factor = (weight.scale * source.scale) / grid.scale
        real = (sums + units.double().view(shape)).float() * factor.view(shape)
        return real.round_().clamp_(grid.low, grid.high).mul_(grid.scale)

    def write(graph: GraphBuilder, name: str) -> str:
        scale = graph.constant(weight.scale, "float32")

        def dequantized_weight(stored: str, zero_point: int, numpy_type: str) -> str:
            zeros = graph.constant(torch.full_like(units, zero_point), numpy_type)
            return graph.node("DequantizeLinear", stored, scale, zeros, axis=0)

        unit = graph.constant(source.scale, "float32")
        inputs = [
            rescale(graph, "DequantizeLinear", name, x),
            write_weight(graph, weight, dequantized_weight, TensorProto.FLOAT, weight.integers.shape),
            graph.node("DequantizeLinear", graph.constant(units), graph.node("Mul", scale, unit), axis=0),
        ]
        result = rescale(graph, "QuantizeLinear", write_layer(graph, node, *inputs), output)
        return result if masked else saturate(graph, result, output)

    return Step(run, write)


def integer_sums(weight: ScaledWeight, x: Value) -> Step:
    """Compute a linear layer from uint8 to its exact sums in float32, bias included, where no grid follows."""
    source = x.on_grid

    def write(graph: GraphBuilder, name: str) -> str:
        zero_point = graph.constant(x.zero_point, "uint8")

        def product(stored: str, offset: int, numpy_type: str) -> str:
            return graph.node("MatMulInteger", name, stored, zero_point, graph.constant(offset, numpy_type))

        transposed = replace(weight, integers=weight.integers.T)
        sums = write_weight(graph, transposed, product, TensorProto.INT32, ["batch", len(weight.integers)])
        if weight.bias is not None:
            sums = graph.node("Add", sums, graph.constant(weight.bias))
        sums = graph.node("Cast", sums, to=TensorProto.FLOAT)
        return graph.node("Mul", sums, graph.constant(weight.scale * source.scale))

    def run(tensor: Tensor) -> Tensor:
        bias = None if weight.bias is None else weight.bias.float()
        return F.linear(tensor / source.scale, weight.integers, bias) * (weight.scale * source.scale)

    return Step(run, write)


def write_weight(
    graph: GraphBuilder, weight: ScaledWeight, write: Callable[[str, int, str], str], dtype: int, shape: Any
) -> str:
    """Write what reads the bytes of a weight: `write(bytes, zero point, numpy type)`, of ONNX type `dtype`."""
    if weight.type == "safe":
        stored = graph.bytes(weight.integers + UINT8_OFFSET, "uint8", UINT8_OFFSET)
        return write(stored, UINT8_OFFSET, "uint8")
    stored = graph.integers(weight.integers, weight.bits, TensorProto.INT8)
    if weight.type == "signed":
        return write(stored, 0, "int8")
    branches = (lambda: write(stored, 0, "int8"), lambda: write(graph.as_unsigned(stored), UINT8_OFFSET, "uint8"))
    return graph.either(graph.exact_int8_sums(), branches, dtype, shape)


def needs_unsigned(weight: Tensor, largest_input: int) -> bool:
    """Whether the weight (out, ...) must be uint8 for its sums to be right on every CPU.

    Without VNNI a CPU adds two products of a uint8 (at most `largest_input`) and an int8 in 16 bits, which saturate,
    and onnxruntime returns wrong sums without an error. Any two weights of a row may be added first.
    """
    rows = weight.flatten(1)
    if rows.shape[1] == 1:
        return False
    top = rows.topk(2, dim=1).values.clamp(min=0).sum(1).max()
    bottom = rows.topk(2, dim=1, largest=False).values.clamp(max=0).sum(1).min()
    return bool(int(top) * largest_input > 32767 or int(bottom) * largest_input < -32768)
