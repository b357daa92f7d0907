"""Steps of a program, each in PyTorch and in ONNX.

Floats: layers, masks, rounding to a grid, and operations without weights. On values on grids, and in float64, both
sides agree in every bit; elsewhere they agree within float32 rounding.

Features stored as uint8: QuantizeLinear and DequantizeLinear that onnxruntime fuses to integer kernels. PyTorch holds
the real numbers n * 2^-decimal, ONNX n + zero_point: the zero point is 0 where nothing is negative, else 128.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

from qprune.compression.fake_quantize import power_of_two
from qprune.compression.functional import fake_quantize
from qprune.compression.pruner import tile_mask
from qprune.errors import UserError
from qprune.export.onnx_graph import TYPES, UINT8_OFFSET, GraphBuilder
from qprune.export.program import FixedPoint, Step, Value
from qprune.export.trace import Node

EXACT_BITS = 24  # integers up to 2^24 are exact in float32
# Types of the bytes of a weight: chosen by the CPU that loads the file, uint8, or int8.
WEIGHT_TYPES = ("auto", "safe", "signed")


def round_to_grid(output: Value, bits: int, rounding: str) -> Step:
    """Apply Eq. 1 to a float, which stays a float."""
    grid, dtype = output.on_grid, output.dtype

    def write(graph: GraphBuilder, x: str) -> str:
        scaled = graph.node("Mul", x, graph.constant(1 / grid.scale, dtype))
        clipped = graph.node("Clip", scaled, graph.constant(grid.low, dtype), graph.constant(grid.high, dtype))
        if rounding == "trunc":  # ONNX has no Trunc, and a cast to an integer truncates
            whole = graph.node("Cast", graph.node("Cast", clipped, to=TensorProto.INT32), to=TYPES[dtype])
        else:
            whole = graph.node({"floor": "Floor", "nearest": "Round"}[rounding], clipped)
        return graph.node("Mul", whole, graph.constant(grid.scale, dtype))

    return Step(lambda x: fake_quantize(x, bits, grid.decimal, rounding), write)


def affine(factor: Tensor | None, shift: Tensor, rank: int) -> Step:
    """Multiply float64 of `rank` dimensions by `factor`, add `shift`, by channel."""
    shape = (-1, *[1] * (rank - 2))

    def run(x: Tensor) -> Tensor:
        return (x if factor is None else x * factor.view(shape)) + shift.view(shape)

    def write(graph: GraphBuilder, x: str) -> str:
        x = x if factor is None else graph.node("Mul", x, graph.constant(factor.view(shape)))
        return graph.node("Add", x, graph.constant(shift.view(shape)))

    return Step(run, write)


@dataclass(frozen=True)
class FeatureMask:
    """A mask (C, h, w) of Eq. 3. dynamic: tiled over each input's own size."""

    mask: Tensor
    border: str
    dynamic: bool

    def tiled(self, x: Tensor) -> Tensor:
        """Return the mask for features x (B, C, H, W)."""
        return tile_mask(self.mask, tuple(x.shape[2:]), self.border).to(x.dtype)

    def write(self, graph: GraphBuilder, x: str) -> str:
        """Return the mask for the value x, as uint8; `tile_mask` in ONNX if dynamic."""
        mask, tile = graph.mask(self.mask), list(self.mask.shape[1:])
        if not self.dynamic or set(tile) == {1}:
            return mask
        node, ints = graph.node, graph.ints

        def tiled(counts: str) -> str:
            return node("Tile", mask, node("Concat", ints(1), counts, axis=0))

        size = node("Shape", x, start=2)
        count = node("Div", size, ints(tile))
        whole = node("Mul", count, ints(tile))
        if self.border == "keep":
            rest = node("Sub", size, whole)
            before = node("Div", rest, ints(2))
            pads = node("Concat", ints(0), before, ints(0), node("Sub", rest, before), axis=0)
            return node("Pad", tiled(count), pads, graph.constant(1, "uint8"))
        # The first tile begins at half of the rest, rounded down, which is negative if the map is smaller than a tile.
        rest = node("Sub", size, node("Max", whole, ints(tile)))
        offset = node("Div", node("Sub", rest, node("Mod", rest, ints(2))), ints(2))
        start = node("Mod", node("Neg", offset), ints(tile))
        end = node("Add", start, size)
        return node("Slice", tiled(node("Add", node("Div", end, ints(tile)), ints(1))), start, end, ints([1, 2]))


def apply_mask(mask: FeatureMask, dtype: str) -> Step:
    """Multiply floats by a mask (Eq. 3)."""

    def write(graph: GraphBuilder, x: str) -> str:
        return graph.node("Mul", x, graph.node("Cast", mask.write(graph, x), to=TYPES[dtype]))

    return Step(lambda x: x * mask.tiled(x), write)


def float_layer(node: Node, bias: Tensor | None) -> Step:
    """Compute a layer on float32; the file stores a weight on a grid as integers."""
    weight = node.weight
    real = node.tensors["weight"] if weight is None else weight.integers.float() * power_of_two(-weight.decimal)

    def write(graph: GraphBuilder, x: str) -> str:
        if weight is None:
            inputs = [x, graph.constant(real)]
        else:
            integers = graph.integers(weight.integers, weight.bits, TensorProto.FLOAT)
            inputs = [x, graph.node("Mul", integers, graph.constant(power_of_two(-weight.decimal)))]
        inputs += [] if bias is None else [graph.constant(bias, "float32")]
        return write_layer(graph, node, *inputs)

    return Step(lambda x: run_layer(node, x, real, bias), write)


def run_layer(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a layer in PyTorch, in the type of x."""
    options = {name: value for name, value in node.arguments.items() if name != "bias"}
    bias = None if bias is None else bias.to(x.dtype)
    result: Tensor = getattr(F, node.op)(x, weight.to(x.dtype), bias, **options)
    return result


def write_layer(graph: GraphBuilder, node: Node, *inputs: str) -> str:
    """Add the ONNX node of a layer; inputs: x, weight and perhaps bias."""
    if node.op == "linear":
        return graph.node("Gemm", *inputs, transB=1)
    a = node.arguments
    if isinstance(a["padding"], str):
        raise UserError(f"padding={a['padding']!r} of the layer {node.path!r} cannot be exported; give it as numbers")
    places = {"pads": list(a["padding"]) * 2, "strides": a["stride"], "dilations": a["dilation"], "group": a["groups"]}
    if any(a.get("output_padding", ())):
        places["output_padding"] = a["output_padding"]
    return graph.node("Conv" if node.op == "conv2d" else "ConvTranspose", *inputs, **places)


def traced_operation(node: Node, dtype: str) -> Step:
    """Compute an operation without weights as it was traced."""
    return Step(node.run, lambda graph, *inputs: _WRITERS[node.op](graph, node, dtype, *inputs))


def pair(value: Any) -> list[int]:
    """Return an argument of a pooling for height and width."""
    values: list[int] = np.broadcast_to(value, 2).tolist()
    return values


def _pool(graph: GraphBuilder, node: Node, dtype: str, x: str) -> str:
    a = node.arguments
    places: dict[str, Any] = {
        "kernel_shape": pair(a["kernel_size"]),
        "strides": pair(a["stride"] or a["kernel_size"]),
        "pads": pair(a["padding"]) * 2,
    }
    if node.op == "max_pool2d":
        return graph.node("MaxPool", x, ceil_mode=int(a["ceil_mode"]), dilations=pair(a["dilation"]), **places)
    if a["divisor_override"]:
        raise UserError(f"divisor_override of the pooling in {node.where} cannot be exported")
    include = int(a["count_include_pad"])
    return graph.node("AveragePool", x, ceil_mode=int(a["ceil_mode"]), count_include_pad=include, **places)


def _norm(graph: GraphBuilder, node: Node, dtype: str, x: str) -> str:
    tensors = {"weight": torch.ones(node.shape[1]), "bias": torch.zeros(node.shape[1])} | node.tensors
    names, op = ["weight", "bias"], "InstanceNormalization"
    if node.op == "batch_norm":
        names, op = [*names, "running_mean", "running_var"], "BatchNormalization"
    values = [graph.constant(tensors[name], "float32") for name in names]
    return graph.node(op, x, *values, epsilon=node.arguments["eps"])


def _clip(graph: GraphBuilder, node: Node, dtype: str, x: str) -> str:
    bounds = (0.0, 6.0) if node.op == "relu6" else (node.arguments["min_val"], node.arguments["max_val"])
    return graph.node("Clip", x, *(graph.constant(float(bound), dtype) for bound in bounds))


def _leaky_relu(graph: GraphBuilder, node: Node, dtype: str, x: str) -> str:
    slope = node.arguments["negative_slope"]
    if dtype == "float32":
        return graph.node("LeakyRelu", x, alpha=slope)
    scaled = graph.node("Mul", x, graph.constant(slope, dtype))  # onnxruntime has no LeakyRelu for float64
    return graph.node("Max" if slope <= 1 else "Min", x, scaled)


def _pad(graph: GraphBuilder, node: Node, dtype: str, x: str) -> str:
    a, modes = node.arguments, {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if a["mode"] not in modes:
        raise UserError(f"padding with mode={a['mode']!r} in {node.where} cannot be exported")
    before, after = a["pad"][::2][::-1], a["pad"][1::2][::-1]  # PyTorch begins with the last dimension
    outer = [0] * (len(node.shape) - len(before))
    value = [graph.constant(float(a["value"] or 0), dtype)] if a["mode"] == "constant" else []
    return graph.node("Pad", x, graph.ints([*outer, *before, *outer, *after]), *value, mode=modes[a["mode"]])


def _mean(graph: GraphBuilder, node: Node, dtype: str, x: str) -> str:
    return graph.node("ReduceMean", x, graph.ints(node.arguments["dim"]), keepdims=int(node.arguments["keepdim"]))


def _pixel_shuffle(graph: GraphBuilder, node: Node, dtype: str, x: str) -> str:
    return graph.node("DepthToSpace", x, blocksize=node.arguments["upscale_factor"], mode="CRD")


def _reshape(graph: GraphBuilder, node: Node, dtype: str, x: str) -> str:
    if node.op == "flatten" and len(node.shape) == 2:
        return graph.node("Flatten", x, axis=1)
    return graph.node("Reshape", x, graph.ints([0, *node.shape[1:]]))


def _same(op: str) -> Callable[..., str]:
    return lambda graph, node, dtype, *inputs: graph.node(op, *inputs)


_WRITERS: dict[str, Callable[..., str]] = {
    "add": _same("Add"),
    "adaptive_avg_pool2d": lambda graph, node, dtype, x: graph.node("ReduceMean", x, graph.ints([2, 3]), keepdims=1),
    "avg_pool2d": _pool,
    "batch_norm": _norm,
    "cat": lambda graph, node, dtype, *x: graph.node("Concat", *x, axis=node.arguments["dim"]),
    "flatten": _reshape,
    "hardtanh": _clip,
    "instance_norm": _norm,
    "leaky_relu": _leaky_relu,
    "max_pool2d": _pool,
    "mean": _mean,
    "pad": _pad,
    "pixel_shuffle": _pixel_shuffle,
    "relu": _same("Relu"),
    "relu6": _clip,
    "reshape": _reshape,
    "sigmoid": _same("Sigmoid"),
    "tanh": _same("Tanh"),
    "view": _reshape,
}


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
    """Round float32, or the sum of uint8 inputs, to uint8: nearest, ties to even."""
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
    """Multiply uint8 by a mask (Eq. 3) by clipping masked elements to [0, 0]."""

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
    """The weight of an integer layer, its batch norm folded into scale and bias.

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
    """Compute a layer from uint8 to uint8: clip(round((sums + bias) * factor)).

    factor: float32, one per channel. masked: a mask that clips to the grid follows.
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
    """Compute a linear layer from uint8 to its exact sums and bias in float32."""
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
    """Write what reads the bytes of a weight: write(bytes, zero point, numpy type)."""
    if weight.type == "safe":
        stored = graph.bytes(weight.integers + UINT8_OFFSET, "uint8", UINT8_OFFSET)
        return write(stored, UINT8_OFFSET, "uint8")
    stored = graph.integers(weight.integers, weight.bits, TensorProto.INT8)
    if weight.type == "signed":
        return write(stored, 0, "int8")
    branches = (lambda: write(stored, 0, "int8"), lambda: write(graph.as_unsigned(stored), UINT8_OFFSET, "uint8"))
    return graph.either(graph.exact_int8_sums(), branches, dtype, shape)


def needs_unsigned(weight: Tensor, largest_input: int) -> bool:
    """Whether a weight (out, ...) must be uint8 for right sums on every CPU.

    Without VNNI a CPU adds two products of a uint8 (at most `largest_input`) and an int8 in 16 bits, which saturate,
    and onnxruntime returns wrong sums without an error. Any two weights of a row may be added first.
    """
    rows = weight.flatten(1)
    if rows.shape[1] == 1:
        return False
    top = rows.topk(2, dim=1).values.clamp(min=0).sum(1).max()
    bottom = rows.topk(2, dim=1, largest=False).values.clamp(max=0).sum(1).min()
    return bool(int(top) * largest_input > 32767 or int(bottom) * largest_input < -32768)
