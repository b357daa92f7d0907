"""Lower a trace to steps on floats that compute the trained network exactly.

Products of numbers on power-of-two grids are integers times one scale, and float32 adds them without error, in any
order, while no sum needs more than 24 bits. What follows a layer and lies on no grid (norms, biases, tanh) is computed
in float64, so that every program rounds it to the same side of the next grid. Where that is impossible (a layer that
reads values on no grid, an instance norm), everything is plain float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qprune.compression.pruner import tile_mask
from qprune.errors import UserError
from qprune.export import steps
from qprune.export.onnx_graph import TYPES
from qprune.export.program import FixedPoint, Program, Step, Value
from qprune.export.steps import EXACT_BITS, FeatureMask, pair, rescale
from qprune.export.trace import LAYERS, POOLS, REARRANGING, Node, Trace


class NotExactError(Exception):
    """An operation cannot be computed exactly; the message says which and why."""


def exact_program(trace: Trace, dynamic_size: bool) -> Program:
    """Return the trained network in exact arithmetic, or in float32 where it must."""
    return exact_if_possible(lambda exact: FloatLowering(trace, dynamic_size, exact))


def exact_if_possible(lowering: Callable[[bool], FloatLowering]) -> Program:
    """Lower exactly, or else in plain float32, with the reason in the notes."""
    try:
        return lowering(True).program()
    except NotExactError as reason:
        program = lowering(False).program()
        program.exact = False
        program.note("", "float32", f"no exact arithmetic: {reason}")
        return program


class FloatLowering:
    """Turns the nodes of a trace into steps on floats, one after the other.

    exact: compute what lies on no grid in float64, and raise NotExactError where that is not enough.
    """

    def __init__(self, trace: Trace, dynamic_size: bool, exact: bool) -> None:
        self.trace, self.dynamic_size, self.exact = trace, dynamic_size, exact
        self.off_grid = "float64" if exact else "float32"
        source = Value(trace.nodes[0].name, "float32", trace.nodes[0].shape)
        self.made: dict[str, Value] = {source.name: source}  # node -> its value
        self.result = Program(source, values={source.name: source}, nodes=self.made)

    def program(self) -> Program:
        """Lower the whole trace."""
        for node in self.trace.nodes:
            if node.name not in self.made:
                inputs = [self.made[name] for name in node.inputs]
                if node.shape[:1] != inputs[0].shape[:1]:
                    raise UserError(f"{node.op} in {node.where} changes the batch, which cannot be exported")
                self.lower(node, inputs)
        self.result.output = self.cast(self.as_float(self.made[self.trace.output]), "float32").name
        return self.result

    def lower(self, node: Node, inputs: list[Value]) -> None:
        """Add the steps of one node."""
        self.made[node.name] = self.lower_to_floats(node, [self.as_float(value) for value in inputs])

    def lower_to_floats(self, node: Node, inputs: list[Value]) -> Value:
        """Add the steps of one node on floats."""
        if node.op in LAYERS:
            return self.layer(node, inputs[0])
        if node.op in POOLS:
            return self.pool(node, inputs[0])
        if node.op == "grid":
            return self.rounded(node, inputs[0])
        if node.op == "mask":
            mask = self.mask_of(node)
            return self.result.add(steps.apply_mask(mask, inputs[0].dtype), inputs, replace(inputs[0], name=node.name))
        if node.op == "batch_norm":
            return self.batch_norm(node, inputs[0])
        return self.other(node, inputs)

    def as_float(self, value: Value) -> Value:
        """Return the value as float32 or float64."""
        name = f"{value.name}.loaded"
        if value.dtype == "uint8" and name not in self.result.values:
            step = Step(torch.clone, lambda graph, x: rescale(graph, "DequantizeLinear", x, value))
            self.result.add(step, [value], Value(name, "float32", value.shape, value.grid))
        return self.result.values[name] if value.dtype == "uint8" else value

    def cast(self, value: Value, dtype: str) -> Value:
        """Return the value in another float type; what lies on a grid loses nothing."""
        if value.dtype == dtype:
            return value
        name = f"{value.name}.{dtype}"
        if name not in self.result.values:
            step = Step(lambda x: x.to(getattr(torch, dtype)), lambda graph, x: graph.node("Cast", x, to=TYPES[dtype]))
            self.result.add(step, [value], replace(value, name=name, dtype=dtype))
        return self.result.values[name]

    def rounded(self, node: Node, x: Value) -> Value:
        a = node.arguments
        output = Value(f"{node.name}.rounded", x.dtype, node.shape, FixedPoint.signed(a["bits"], a["decimal"]))
        return self.cast(self.result.add(steps.round_to_grid(output, a["bits"], a["rounding"]), [x], output), "float32")

    def mask_of(self, node: Node) -> FeatureMask:
        """Return the mask of a node, tiled now unless the size of the input may change."""
        mask, size, border = node.tensors["mask"], node.shape[2:], node.arguments["border"]
        dynamic = self.dynamic_size and bool(size)
        if not dynamic and mask.shape[1:] != size and any(n != 1 for n in mask.shape[1:]):
            mask = tile_mask(mask, size, border)
        return FeatureMask(mask, border, dynamic)

    def layer(self, node: Node, x: Value) -> Value:
        """Compute a layer in float32, or exact sums in float32 and its bias in float64."""
        bias, reason = node.tensors.get("bias"), self.why_float(node, x)
        x32 = self.cast(x, "float32")
        if not self.exact:
            self.result.note(node.path, "float32", reason)
            return self.result.add(steps.float_layer(node, bias), [x32], Value(node.name, "float32", node.shape))
        sums = Value(f"{node.name}.sums", "float32", node.shape, sums_grid(node, x))
        self.result.note(node.path, "float32, exact sums", reason)
        self.result.add(steps.float_layer(node, None), [x32], sums)
        if bias is None:
            return sums
        output = Value(node.name, "float64", node.shape)
        return self.result.add(steps.affine(None, bias.double(), len(node.shape)), [self.cast(sums, "float64")], output)

    def why_float(self, node: Node, x: Value) -> str:
        """Return why the layer is computed on floats; empty if that was asked for."""
        if node.op == "conv_transpose2d":
            return "a transposed convolution, for which onnxruntime has no integer kernel"
        if node.weight is None:
            return "its weight is on no grid"
        return "its input is on no grid" if x.grid is None else ""

    def batch_norm(self, node: Node, x: Value) -> Value:
        if node.arguments["training"]:
            raise UserError(f"the batch norm {node.path!r} uses each batch's own statistics, which cannot be exported")
        output = Value(node.name, self.off_grid, node.shape)
        if self.exact:
            step = steps.affine(*affine_of(node), len(node.shape))
        else:
            step = steps.traced_operation(node, "float32")
        return self.result.add(step, [self.cast(x, self.off_grid)], output)

    def pool(self, node: Node, x: Value) -> Value:
        """Average on a grid if the divisor is a power of two, else in float64 or float32."""
        a, size = node.arguments, list(x.shape[2:])
        adaptive = node.op == "adaptive_avg_pool2d"
        if adaptive and list(a["output_size"]) not in ([1, 1], [1]):
            raise UserError(f"adaptive pooling to other than one place ({node.path!r}) cannot be exported")
        window = size if adaptive else pair(a["kernel_size"])
        padded = not adaptive and (any(pair(a["padding"])) or a["ceil_mode"])
        count, grid = window[0] * window[1], None
        if x.grid is not None and count & (count - 1) == 0 and not padded and not (adaptive and self.dynamic_size):
            grid = FixedPoint(x.grid.decimal + count.bit_length() - 1, x.grid.low * count, x.grid.high * count)
        if x.dtype == "float32" and (grid is not None or not self.exact):
            output = Value(node.name, "float32", node.shape, grid)
            return self.result.add(steps.traced_operation(node, "float32"), [x], output)
        if window != size or padded or self.dynamic_size:
            raise NotExactError(f"the pooling {node.path or node.name!r} is no mean of a whole map on a grid")
        step = steps.traced_operation(replace(node, op="adaptive_avg_pool2d"), "float64")
        return self.result.add(step, [self.cast(x, "float64")], Value(node.name, "float64", node.shape))

    def other(self, node: Node, inputs: list[Value]) -> Value:
        """Compute an operation without weights, on its grid where it keeps one."""
        if node.op == "instance_norm":
            if self.exact:
                raise NotExactError(f"the instance norm {node.path!r} is computed differently everywhere")
            self.result.note(node.path, "float32", "an instance norm, which takes each picture's own statistics")
        grid = result_grid(node, inputs)
        on_float32 = grid is not None and {value.dtype for value in inputs} == {"float32"}
        dtype = "float32" if on_float32 else self.off_grid
        sources = [self.cast(value, dtype) for value in inputs]
        return self.result.add(steps.traced_operation(node, dtype), sources, Value(node.name, dtype, node.shape, grid))


def affine_of(node: Node) -> tuple[Tensor, Tensor]:
    """Return factor and shift of a batch norm by channel, in float64."""
    t = {name: tensor.double() for name, tensor in node.tensors.items()}
    factor = 1 / torch.sqrt(t["running_var"] + node.arguments["eps"])
    if "weight" in t:
        factor = factor * t["weight"]
    shift = -t["running_mean"] * factor
    return factor, shift + t["bias"] if "bias" in t else shift


def sums_grid(node: Node, x: Value) -> FixedPoint:
    """Return the grid of a layer's sums without bias.

    Raises:
        NotExactError: input or weight lies on no grid, or the sums may need more than 24 bits.
    """
    if x.grid is None or node.weight is None:
        raise NotExactError(f"the layer {node.path!r} has {'an input' if x.grid is None else 'a weight'} on no grid")
    if node.op == "conv_transpose2d":
        raise NotExactError(f"the transposed convolution {node.path!r} is left to float32")
    largest = int(node.weight.on_finest.flatten(1).abs().sum(1).max()) * x.grid.largest
    if largest >= 2**EXACT_BITS:
        raise NotExactError(f"the sums of the layer {node.path!r} may need more than {EXACT_BITS} bits")
    return FixedPoint(x.grid.decimal + node.weight.finest, -largest, largest)


def result_grid(node: Node, inputs: Sequence[Value]) -> FixedPoint | None:
    """Return the grid of an operation's result in 24 bits, if it has one."""
    grids = [value.grid for value in inputs if value.grid is not None]
    if len(grids) < len(inputs):
        return None
    if node.op in REARRANGING or (node.op == "pad" and node.arguments["mode"] != "constant"):
        return grids[0]
    if node.op == "relu":
        return FixedPoint(grids[0].decimal, max(grids[0].low, 0), max(grids[0].high, 0))
    if node.op not in ("add", "cat"):
        return None
    finest = max(grid.decimal for grid in grids)
    lows = [grid.low << (finest - grid.decimal) for grid in grids]
    highs = [grid.high << (finest - grid.decimal) for grid in grids]
    sums = node.op == "add"
    grid = FixedPoint(finest, sum(lows) if sums else min(lows), sum(highs) if sums else max(highs))
    return grid if grid.largest < 2**EXACT_BITS else None
