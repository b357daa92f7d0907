"""From a trace to a program whose results are those of the trained network in exact arithmetic.

Grids make exactness cheap: products of numbers on power-of-two grids are whole multiples of the product of the steps,
and float32 adds them without error, in any order, while no sum needs more than 24 bits. What comes after a layer and is
on no grid (norms, biases, tanh) is computed in float64, so that rounding to the next grid finds the same side for
everyone. Where that is impossible (a layer reads values on no grid, an instance norm), all is plain float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qprune.compression.functional import integer_range
from qprune.compression.pruner import tile_mask
from qprune.errors import UserError
from qprune.export.floats import Affine, Cast, Layer, Mask, Round
from qprune.export.operations import Apply
from qprune.export.program import Grid, Program, Value
from qprune.export.tracing import LAYERS, Node, Trace
from qprune.export.weights import Weight

EXACT_BITS = 24  # whole numbers up to 2^24 are exact in float32
MOVES = ("flatten", "reshape", "pixel_shuffle", "max_pool")  # elements move or are chosen, none is made


class NotExactError(Exception):
    """Some operation cannot be carried out exactly; the message says which and why."""


def exact_program(trace: Trace, dynamic_size: bool) -> Program:
    """The trained network as it is: exactly, with `promise`, or in float32 without it and the reason in the notes."""
    try:
        return Lowering(trace, dynamic_size, precise=True).program()
    except NotExactError as reason:
        program = Lowering(trace, dynamic_size, precise=False).program()
        program.promise = False
        program.notes.append({"path": "", "kernel": "float32", "why": f"no exact arithmetic: {reason}"})
        return program


class Lowering:
    """Turns nodes into steps, one after the other. precise: with float64 where values are on no grid."""

    def __init__(self, trace: Trace, dynamic_size: bool, precise: bool) -> None:
        self.trace, self.dynamic, self.precise = trace, dynamic_size, precise
        first = trace.nodes[0]
        self.made: dict[str, Value] = {first.name: Value(first.name, "float32", first.shape)}
        self.result = Program(self.made[first.name])
        self.result.values[first.name] = self.made[first.name]
        self.done: set[str] = {first.name}

    @property
    def loose(self) -> str:
        """The form of values on no grid."""
        return "float64" if self.precise else "float32"

    def program(self) -> Program:
        """The whole program."""
        for node in self.trace.nodes[1:]:
            if node.name not in self.done:
                self.lower(node)
        result = self.as_float(self.made[self.trace.output])
        self.result.output = self.cast(result, "float32").name
        self.result.nodes = self.made
        return self.result

    def lower(self, node: Node) -> None:
        """Add the steps of one node."""
        inputs = [self.as_float(self.made[name]) for name in node.inputs]
        self.made[node.name] = self.floats(node, inputs)

    def as_float(self, value: Value) -> Value:
        """The value as a float; here all are."""
        return value

    def cast(self, value: Value, form: str) -> Value:
        """The value in another float type. What is on a grid loses nothing."""
        if value.form == form:
            return value
        name = f"{value.name}.{form}"
        if name not in self.result.values:
            self.result.add(Cast(form), [value], Value(name, form, value.shape, value.grid))
        return self.result.values[name]

    def floats(self, node: Node, inputs: list[Value]) -> Value:
        """The node on floats."""
        if node.op in LAYERS:
            return self.layer(node, inputs[0])
        special: dict[str, Callable[[Node, Value], Value]] = {
            "grid": self.to_grid,
            "mask": self.masked,
            "batch_norm": self.batch_norm,
            "avg_pool": self.pooled,
            "adaptive_avg_pool": self.pooled,
        }
        if node.op in special:
            return special[node.op](node, inputs[0])
        return self.plain(node, inputs)

    def to_grid(self, node: Node, x: Value) -> Value:
        a = node.arguments
        grid = Grid(a["decimal"], *integer_range(a["bits"]))
        step = Round(grid, a["bits"], a["rounding"], x.form)
        rounded = self.result.add(step, [x], Value(f"{node.name}.rounded", x.form, node.shape, grid))
        return self.cast(rounded, "float32")

    def masked(self, node: Node, x: Value) -> Value:
        mask, dynamic = self.mask_of(node)
        step = Mask(mask, node.arguments["border"], dynamic, x.form)
        return self.result.add(step, [x], Value(node.name, x.form, node.shape, x.grid))

    def mask_of(self, node: Node) -> tuple[Tensor, bool]:
        """The mask, and whether it must be laid out when the size is known."""
        mask, size = node.tensors["mask"], node.shape[2:]
        if self.dynamic and size:
            return mask, True
        if mask.shape[1:] != size and any(n != 1 for n in mask.shape[1:]):
            mask = tile_mask(mask, size, node.arguments["border"])
        return mask, False

    def layer(self, node: Node, x: Value) -> Value:
        bias = node.tensors.get("bias")
        try:
            grid = sums_grid(node, x)
        except NotExactError:
            if self.precise:
                raise
            grid = None
        weight = node.weight if node.weight is not None else node.tensors["weight"]
        if node.op == "linear" and len(x.shape) != 2:
            raise UserError(
                f"the linear layer {node.path!r} reads {len(x.shape)} dimensions, and export writes it for 2"
            )
        if grid is None or not self.precise:
            self.note(node, "float32", self.why_float(node, x))
            step = Layer(node.op, weight, bias, node.arguments)
            return self.result.add(step, [self.cast(x, "float32")], Value(node.name, "float32", node.shape))
        self.note(node, "float32, exact sums", self.why_float(node, x))
        return self.biased(node, self.sums(node, x, weight, grid), bias)

    def why_float(self, node: Node, x: Value) -> str:
        """Why the layer is carried out on floats, or nothing where it was to be."""
        if node.op == "conv_transpose":
            return "a transposed convolution, for which onnxruntime has no integer kernel"
        if node.weight is None:
            return "its weight is on no grid"
        return "its input is on no grid" if x.grid is None else ""

    def sums(self, node: Node, x: Value, weight: Weight | Tensor, grid: Grid) -> Value:
        """The layer without its bias, exactly."""
        made = Value(f"{node.name}.sums", "float32", node.shape, grid)
        return self.result.add(Layer(node.op, weight, None, node.arguments), [self.cast(x, "float32")], made)

    def biased(self, node: Node, sums: Value, bias: Tensor | None) -> Value:
        """Sums and bias, the latter in float64."""
        if bias is None:
            return sums
        step = Affine(None, bias.double(), "float64", rank=len(node.shape))
        return self.result.add(step, [self.cast(sums, "float64")], Value(node.name, "float64", node.shape))

    def batch_norm(self, node: Node, x: Value) -> Value:
        if node.arguments["training"]:
            raise UserError(f"the batch norm {node.path!r} uses each batch's own statistics, which cannot be exported")
        if not self.precise:
            arguments = {"eps": node.arguments["eps"], "channels": node.shape[1]}
            step: Any = Apply("batch_norm", arguments, node.tensors, "float32")
            return self.result.add(step, [x], Value(node.name, "float32", node.shape))
        factor, shift = affine_of(node)
        step = Affine(factor, shift, "float64", rank=len(node.shape))
        return self.result.add(step, [self.cast(x, "float64")], Value(node.name, "float64", node.shape))

    def pooled(self, node: Node, x: Value) -> Value:
        """Means: exact on a grid where a power of two is divided by, else in float64 over the whole map."""
        a, size = node.arguments, self.result.values[x.name].shape[2:]
        if node.op == "adaptive_avg_pool":
            window = list(size)
            if [*a["output_size"]] not in ([1, 1], [1]):
                raise UserError(f"adaptive pooling to other than one place ({node.path!r}) cannot be exported")
        else:
            window = [a["kernel_size"]] * 2 if isinstance(a["kernel_size"], int) else list(a["kernel_size"]) * 2
        whole = window[:2] == list(size) and not (node.op == "avg_pool" and any(_flat(a["padding"])))
        count = window[0] * window[1]
        grid = None
        if x.grid is not None and count & (count - 1) == 0:
            bits = count.bit_length() - 1
            grid = Grid(x.grid.decimal + bits, x.grid.low * count, x.grid.high * count)
        if x.form == "float64" or (self.precise and grid is None):
            if not whole or self.dynamic:
                raise NotExactError(f"the pooling {node.path or node.name!r} is no mean of a whole map on a grid")
            step = Apply("mean", {"dim": [2, 3], "keepdim": True}, {}, "float64")
            return self.result.add(step, [self.cast(x, "float64")], Value(node.name, "float64", node.shape))
        step = Apply(node.op, a, {}, "float32")
        return self.result.add(step, [x], Value(node.name, "float32", node.shape, grid))

    def plain(self, node: Node, inputs: list[Value]) -> Value:
        """Everything else, on its grid where it keeps one."""
        grid = kept_grid(node, inputs)
        if node.op == "instance_norm":
            if self.precise:
                raise NotExactError(f"the instance norm {node.path!r} is computed differently everywhere")
            node.arguments["channels"] = node.shape[1]
            self.note(node, "float32", "an instance norm, which takes each picture's own statistics")
        forms = {value.form for value in inputs}
        form = "float32" if grid is not None and forms == {"float32"} else self.loose
        if node.op == "mean" and self.precise:
            form = "float64"
        arguments = dict(node.arguments) | {"rank": len(node.shape)}
        step = Apply(node.op, arguments, node.tensors, form)
        return self.result.add(step, [self.cast(v, form) for v in inputs], Value(node.name, form, node.shape, grid))

    def note(self, node: Node, kernel: str, why: str) -> None:
        """Remember how a layer is carried out."""
        self.result.notes.append({"path": node.path, "kernel": kernel, "why": why})


def affine_of(node: Node) -> tuple[Tensor, Tensor]:
    """Factor and shift of a batch norm by channel, in float64."""
    t = {name: tensor.double() for name, tensor in node.tensors.items()}
    factor = 1 / torch.sqrt(t["running_var"] + node.arguments["eps"])
    if "weight" in t:
        factor = factor * t["weight"]
    shift = -t["running_mean"] * factor
    return factor, shift + t["bias"] if "bias" in t else shift


def sums_grid(node: Node, x: Value) -> Grid | None:
    """The grid of a layer's sums without bias, or None where something is on no grid.

    Raises NotExactError when it is on one and the sums may need more than 24 bits, or, for precise arithmetic, None's
    reason.
    """
    if x.grid is None or node.weight is None:
        raise NotExactError(f"the layer {node.path!r} has {'an input' if x.grid is None else 'a weight'} on no grid")
    weight = node.weight.on_finest
    if node.op == "conv_transpose":
        raise NotExactError(f"the transposed convolution {node.path!r} is left to float32")
    largest = int(weight.flatten(1).abs().sum(1).max()) * x.grid.largest
    if largest >= 2**EXACT_BITS:
        raise NotExactError(f"the sums of the layer {node.path!r} may need more than {EXACT_BITS} bits")
    return Grid(x.grid.decimal + node.weight.finest, -largest, largest)


def kept_grid(node: Node, inputs: Sequence[Value]) -> Grid | None:
    """The grid of an operation's result if all inputs have one and the operation keeps it."""
    grids = [value.grid for value in inputs]
    if any(grid is None for grid in grids):
        return None
    first: Grid = grids[0]  # type: ignore[assignment]
    if node.op in MOVES:
        return first
    if node.op == "pad" and node.arguments["mode"] != "constant":
        return first
    if node.op == "relu":
        return Grid(first.decimal, max(first.low, 0), max(first.high, 0))
    if node.op == "add":
        finest = max(grid.decimal for grid in grids if grid)
        bounds = [(g.low << (finest - g.decimal), g.high << (finest - g.decimal)) for g in grids if g]
        grid = Grid(finest, sum(low for low, _ in bounds), sum(high for _, high in bounds))
        return grid if grid.largest < 2**EXACT_BITS else None
    if node.op == "concat":
        finest = max(grid.decimal for grid in grids if grid)
        wide = [Grid(finest, g.low << (finest - g.decimal), g.high << (finest - g.decimal)) for g in grids if g]
        grid = Grid(finest, min(g.low for g in wide), max(g.high for g in wide))
        return grid if grid.largest < 2**EXACT_BITS else None
    return None


def _flat(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)
