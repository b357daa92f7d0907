"""Rewrite a traced network to integer kernels: 8-bit layers with batch norms folded in, the rest in float32.

Weights stay the integers that were trained; the factor of a norm goes into the scale of the layer's output channel, its
shift into an int32 bias in units of the sums. Three things may change, and the notes list them: a bias moves by at most
half a unit of the sums; a tensor between two integer kernels that was trained without a grid gets one by calibration;
weights whose fraction bits differ by input channel, which no integer kernel takes, are requantized per output channel.

PyTorch and the file agree in every bit where float operations do not round: numbers on power-of-two grids are integers
times one scale, which float32 adds and moves without error up to 24 bits. What follows such sums and lies on no grid,
as a bias, a norm or a tanh, is computed in float64, so that both round it to the same side of the next grid. Else
equality is not promised, and `rounds` says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from qprune.compression.functional import optimal_decimal
from qprune.export.fixed_point import Affine, FixedPoint, affine_of, folded, needs_unsigned
from qprune.export.trace import (
    GridWeight,
    arguments,
    averaged_values,
    bounds_of,
    followers,
    is_identity,
    only_relus_read,
    operation,
    run_and_keep,
    site_of,
)

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
# Each output element is an input element.
REARRANGING = (
    *("chunk", "expand", "flatten", "getitem", "max_pool1d", "max_pool2d", "permute", "pixel_shuffle", "reshape"),
    *("select", "slice", "split", "split_with_sizes", "squeeze", "transpose", "unflatten", "unsqueeze", "view"),
)
READ_AS_INTEGERS = ("adaptive_avg_pool2d", "add", "avg_pool2d", "cat", "max_pool2d", "mean")
CALIBRATED_BITS, CALIBRATED_DECIMALS = 8, range(-8, 20)
ops = torch.ops.qprune


@dataclass(frozen=True)
class Value:
    """What a node of the trace became.

    grid: where every element lies; None for arbitrary floats and for what is no feature. stored: whether it is uint8,
    n + grid.zero for n * grid.scale, and not float32. zero: the zero point of what is stored. wide: whether it is
    float64, on no grid.
    """

    node: fx.Node
    grid: FixedPoint | None = None
    stored: bool = False
    zero: int = 0
    wide: bool = False

    @property
    def on_grid(self) -> FixedPoint:
        """The grid of a value that has one."""
        assert self.grid is not None
        return self.grid


@dataclass
class IntegerProgram:
    """A network in integer kernels.

    Attributes:
        traced: The trained network.
        module: The network in integer kernels; it takes the leaves of the inputs and returns those of the outputs.
        rounds: What keeps `module` and its file from agreeing in every bit, or an empty text.
        notes: One row per layer (path, kernel, why) and per grid that calibration added.
        features: Site, node of the trace and value, for each grid of the network.
        unsigned: Names of weights whose bytes some CPUs have to read unsigned.
    """

    traced: fx.GraphModule
    module: fx.GraphModule
    rounds: str = ""
    notes: list[dict[str, Any]] = field(default_factory=list)
    features: list[tuple[str, fx.Node, Value]] = field(default_factory=list)
    unsigned: set[str] = field(default_factory=set)


def integer_program(traced: fx.GraphModule, calibration: Mapping[str, int]) -> IntegerProgram:
    """Return a network in integer kernels where they exist, else in floats.

    Args:
        traced: The trained network, see `trace`.
        calibration: Fraction bits of features that were trained without a grid, see `calibrate`.
    """
    return _Lowering(traced, calibration).program()


def calibrate(traced: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, int]:
    """Choose fraction bits, on one batch, for batch norms that no grid follows.

    Returns:
        Name of the norm's node -> fraction bits.
    """
    norms = [node for node in traced.graph.nodes if operation(node) == "batch_norm" and "grid" not in followers(node)]
    found = {}
    for node, value in run_and_keep(traced, inputs, norms).items():
        decimal = optimal_decimal(value.flatten(), CALIBRATED_BITS, decimals=CALIBRATED_DECIMALS, rounding="nearest")
        found[node.name] = int(decimal)
    return found


class _Lowering:
    """Makes the nodes of an integer program from those of a trace, one after the other."""

    def __init__(self, traced: fx.GraphModule, calibration: Mapping[str, int]) -> None:
        self.traced, self.calibration = traced, calibration
        self.graph, self.root = fx.Graph(), nn.Module()
        self.made: dict[fx.Node, Value] = {}
        self.constants: dict[fx.Node, Tensor] = {}
        self.weights: dict[fx.Node, GridWeight] = {}
        self.floats: dict[fx.Node, Value] = {}
        self.result = IntegerProgram(traced, traced)

    def program(self) -> IntegerProgram:
        """Lower the whole trace."""
        for node in self.traced.graph.nodes:
            if node.op == "get_attr":
                self.constants[node] = attrgetter(node.target)(self.traced).detach()
            elif node.op == "placeholder":
                self.made[node] = Value(self.graph.placeholder(node.name))
            elif node.op == "output":
                self.graph.output(map_arg(node.args[0], self.as_float))
            elif node not in self.made:
                self.lower(node)
        self.result.module = fx.GraphModule(self.root, self.graph).eval()
        return self.result

    def lower(self, node: fx.Node) -> None:
        """Add what computes one node."""
        values = [self.made[n] for n in node.all_input_nodes if n in self.made]
        if not values:
            self.fold(node)
        elif not any(torch.is_tensor(each) for each in tree_leaves(node.meta["val"])):
            self.made[node] = Value(self.copied(node))  # a size
        elif is_identity(node):
            self.made[node] = values[0]
        else:
            self.made[node] = self.handlers.get(operation(node), _Lowering.other)(self, node, values)

    def fold(self, node: fx.Node) -> None:
        """Compute what depends on constants alone."""
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.constants[n])
        self.constants[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        if operation(node) == "weight":
            given: Any = args
            integers, decimal, axis, bits = given
            shape = [-1 if dim == axis else 1 for dim in range(integers.dim())]
            self.weights[node] = GridWeight(integers.int(), torch.tensor(decimal, dtype=torch.int32).view(shape), bits)

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def attribute(self, tensor: Tensor, kind: str = "constant") -> fx.Node:
        """Return a node that holds a constant."""
        name = f"{kind}_{len(list(self.root.named_buffers(remove_duplicate=False)))}"
        self.root.register_buffer(name, tensor.contiguous())
        return self.graph.get_attr(name)

    def as_float(self, node: fx.Node) -> fx.Node:
        """Return what a node became in float32, or a constant; weights on a grid are kept as integers."""
        if node in self.made:
            return self.to_float(self.made[node]).node
        if node in self.weights:
            return self.call(
                ops.weight.default, self.attribute(self.constants[node.all_input_nodes[0]]), *node.args[1:]
            )
        return self.attribute(self.constants[node])

    def to_float(self, value: Value) -> Value:
        """Return a value in float32, to which float64 is rounded."""
        if value.stored and value.node not in self.floats:
            real = self.call(ops.dequantize.default, value.node, value.on_grid.decimal, value.zero)
            self.floats[value.node] = Value(real, value.grid)
        if value.wide and value.node not in self.floats:
            self.floats[value.node] = Value(self.graph.call_method("float", (value.node,)))
        return self.floats.get(value.node, value)

    def to_double(self, value: Value) -> fx.Node:
        """Return a value in float64."""
        return value.node if value.wide else self.graph.call_method("double", (self.to_float(value).node,))

    def copied(self, node: fx.Node, of: Callable[[Value], fx.Node] = attrgetter("node")) -> fx.Node:
        """Return the same operation on what its inputs became, as it is or as what `of` makes of it."""
        made = map_arg((node.args, node.kwargs), lambda n: of(self.made[n]) if n in self.made else self.as_float(n))
        return self.graph.call_function(node.target, *made)  # type: ignore[arg-type]

    def in_floats(self, node: fx.Node, grid: FixedPoint | None = None) -> Value:
        return Value(self.copied(node, lambda value: self.to_float(value).node), grid)

    def other(self, node: fx.Node, values: Sequence[Value], why: str = "") -> Value:
        """Compute any operation of torch in float32."""
        val = node.meta["val"]
        if not why and torch.is_tensor(val) and val.is_floating_point():
            why = f"{operation(node)} at {site_of(node)} is computed on floats"
        self.result.rounds = self.result.rounds or why
        return self.in_floats(node)

    def added(self, node: fx.Node, values: Sequence[Value]) -> Value:
        """Add two features in integers if an 8-bit grid follows, else on the finer of their grids."""
        grids = [value.grid for value in values if value.grid is not None]
        if len(grids) != 2 or len(node.args) != 2 or node.kwargs:
            return self.other(node, values)
        behind, sums = followers(node), _finer(grids)
        found = None if "batch_norm" in behind else self.grid_behind(behind)
        if all(value.stored for value in values) and found is not None and found[1] == "nearest":
            made = self.quantized(self.in_floats(node), found[0])
            self.made |= {behind["clip"]: made} if "clip" in behind else {}
            return made
        total = FixedPoint(sums[0].decimal, sums[0].low + sums[1].low, sums[0].high + sums[1].high)
        return self.in_floats(node, total) if total.fits else self.other(node, values)

    def joined(self, node: fx.Node, values: Sequence[Value]) -> Value:
        """Concatenate integers of one grid, or floats on the finest grid."""
        grids = [value.grid for value in values if value.grid is not None]
        if len(grids) != len(node.all_input_nodes):
            return self.other(node, values)
        if len({(value.grid, value.stored, value.zero) for value in values}) == 1:
            return replace(values[0], node=self.copied(node))
        parts = _finer(grids)
        grid = FixedPoint(parts[0].decimal, min(p.low for p in parts), max(p.high for p in parts))
        return self.in_floats(node, grid) if grid.fits else self.other(node, values)

    def rearranged(self, node: fx.Node, values: Sequence[Value]) -> Value:
        """Move elements, which keep their type and grid."""
        return replace(values[0], node=self.copied(node))

    def padded(self, node: fx.Node, values: Sequence[Value]) -> Value:
        """Pad with zeros, which lie on a grid and are the zero point of integers."""
        x, a = values[0], arguments(node)
        holds_zero = x.grid is not None and x.grid.low <= 0 <= x.grid.high
        if a["mode"] != "constant" or a["value"] or not holds_zero or not all(isinstance(n, int) for n in a["pad"]):
            return self.moved(node, values)
        made = self.call(torch.constant_pad_nd, x.node, list(a["pad"]), x.zero if x.stored else 0.0)
        return replace(x, node=made)

    def clipped(self, node: fx.Node, values: Sequence[Value]) -> Value:
        """Apply a ReLU or other bounds, where possible by narrowing the grid."""
        x, bounds = values[0], bounds_of(node)
        if x.wide and bounds is not None:
            return Value(self.copied(node), wide=True)
        grid = None if bounds is None or x.grid is None else x.grid.clipped(bounds)
        if grid is None:
            return self.other(node, values)
        if not x.stored:
            return self.in_floats(node, grid)
        if grid == x.grid:
            return x
        return replace(x, node=self.call(ops.clip.default, x.node, grid.low + x.zero, grid.high + x.zero), grid=grid)

    def grid_of(self, node: fx.Node) -> FixedPoint:
        """Return the grid of a quantizer, from 0 on where only ReLUs read it."""
        a = arguments(node)
        grid = FixedPoint.signed(a["bits"], a["decimal"])
        return replace(grid, low=0) if only_relus_read(node) else grid

    def rounded(self, node: fx.Node, values: Sequence[Value]) -> Value:
        """Round a feature to its grid: to uint8, or in floats where it has more than 8 bits."""
        x, a, grid = values[0], arguments(node), self.grid_of(node)
        done = x.grid is not None and x.grid.decimal == grid.decimal
        if not (x.stored and done and grid.low <= x.on_grid.low and x.on_grid.high <= grid.high):
            x = self.to_float(x)
            if a["bits"] > 8 or a["rounding"] != "nearest":
                signed = FixedPoint.signed(a["bits"], a["decimal"])
                whole = {"floor": torch.floor, "nearest": torch.round, "trunc": torch.trunc}[a["rounding"]]
                scaled = self.call(torch.clamp, self.call(torch.mul, x.node, 1 / grid.scale), signed.low, signed.high)
                x = Value(self.call(torch.mul, self.call(whole, scaled), grid.scale), signed)
            x = self.quantized(x, grid) if a["bits"] <= 8 else x
        self.result.features.append((a["site"], node, x))
        return x

    def quantized(self, x: Value, grid: FixedPoint) -> Value:
        """Convert float32 to uint8."""
        node = self.call(ops.quantize.default, x.node, grid.decimal, grid.low, grid.high, grid.zero)
        return Value(node, grid, True, grid.zero)

    def masked(self, node: fx.Node, values: Sequence[Value]) -> Value:
        """Multiply by a mask (Eq. 3); integers are clipped to [0, 0] where it is 0, elsewhere to their grid."""
        x, kept = values[0], node.args[1]
        assert isinstance(kept, fx.Node)
        if not x.stored:
            return replace(x, node=self.call(torch.mul, x.node, self.as_float(kept)))
        if kept in self.made:  # tiled over an input of any size
            zero = self.attribute(torch.tensor(x.zero, dtype=torch.uint8))
            return replace(x, node=self.call(torch.where, self.call(torch.gt, self.made[kept].node, 0.5), x.node, zero))
        made, ends = x.node, [(torch.minimum, x.on_grid.high), (torch.maximum, x.on_grid.low)]
        for clip, end in ends if x.zero else ends[:1]:
            bound = torch.where(self.constants[kept] > 0.5, end + x.zero, x.zero).to(torch.uint8)
            made = self.call(clip, made, self.attribute(bound, "mask"))
        return replace(x, node=made)

    def averaged(self, node: fx.Node, values: Sequence[Value]) -> Value:
        """Average on a grid if the divisor is a power of two; else as the sum of a whole map and one division."""
        x, a, count = values[0], arguments(node), averaged_values(node)
        if x.grid is None or not count:
            return self.other(node, values)
        divisor = a.get("divisor_override") or count
        sums = FixedPoint(x.grid.decimal, x.grid.low * count, x.grid.high * count)
        if sums.fits and divisor & (divisor - 1) == 0:
            return self.in_floats(node, replace(sums, decimal=sums.decimal + divisor.bit_length() - 1))
        size = [n for n in node.args[0].meta["val"].shape[2:] if isinstance(n, int)]  # type: ignore[union-attr]
        whole = operation(node) != "mean" or sorted(n % 4 for n in a["dim"]) == [2, 3]
        if not (sums.fits and whole and len(size) == 2 and count == math.prod(size)):
            return self.other(node, values)
        total = self.call(torch.sum, self.to_float(x).node, [2, 3], a.get("keepdim", True))
        return Value(self.call(torch.div, total, float(divisor)))

    def layer(self, node: fx.Node, values: Sequence[Value]) -> Value:
        """Compute a layer in integers, else in float32."""
        x, a, path = values[0], arguments(node), site_of(node)
        weight, bias = self.weights.get(a["weight"]), self.constants.get(a["bias"])
        made = None
        if x.stored and weight is not None and weight.bits <= 8 and (bias is not None or a["bias"] is None):
            made = self.layer_in_integers(node, x, weight, bias)
        if made is not None:
            return made
        self.note(path, "float32", _why_float(node, weight, x))
        return self.layer_in_floats(node, values, weight, bias)

    def layer_in_floats(
        self, node: fx.Node, values: Sequence[Value], weight: GridWeight | None, bias: Tensor | None
    ) -> Value:
        """Compute sums in float32, and behind exact ones the bias in float64."""
        x, sums = values[0], None
        if x.grid is not None and weight is not None and "transpose" not in operation(node):
            largest = int(weight.on_finest.flatten(1).abs().sum(1).max()) * max(-x.grid.low, x.grid.high)
            sums = FixedPoint(x.grid.decimal + weight.finest, -largest, largest)
        if sums is None or not sums.fits or (bias is None and arguments(node)["bias"] is not None):
            return self.other(node, values, f"the layer {site_of(node)} is computed on floats")
        made = self.in_floats(node, sums)
        if bias is None:
            return made
        made.node.args = (*made.node.args[:2], None, *made.node.args[3:])
        return self.affine(made, None, bias, node)

    def affine(self, x: Value, factor: Tensor | None, shift: Tensor, node: fx.Node) -> Value:
        """Return factor * x + shift by channel, in float64, in the shape of `node`."""
        made, channels_last = self.to_double(x), operation(node) == "linear"
        by_channel = (-1, *[1] * (0 if channels_last else node.meta["val"].dim() - 2))
        for apply, tensor in ((torch.mul, factor), (torch.add, shift)):
            if tensor is not None:
                made = self.call(apply, made, self.attribute(tensor.double().view(by_channel)))
        return Value(made, wide=True)

    def moved(self, node: fx.Node, values: Sequence[Value]) -> Value:
        """Repeat or pad floats, as masks are for an input of any size."""
        return self.in_floats(node)

    def normed(self, node: fx.Node, values: Sequence[Value]) -> Value:
        """Apply a batch norm in float64."""
        affine = affine_of(node)
        return self.affine(values[0], affine.factor, affine.shift, node) if affine else self.other(node, values)

    def smooth(self, node: fx.Node, values: Sequence[Value]) -> Value:
        """Compute an elementwise function in float64."""
        return Value(self.call(node.target, self.to_double(values[0])), wide=True)

    def layer_in_integers(self, node: fx.Node, x: Value, weight: GridWeight, bias: Tensor | None) -> Value | None:
        """Compute a layer and what follows in integers; return None where there is no kernel."""
        behind, window, linear = followers(node), _window(node, weight), operation(node) == "linear"
        found = self.grid_behind(behind)
        if window is None or (found is None and not linear):
            return None
        grid, rounding = found or (None, "nearest")
        affine = affine_of(behind["batch_norm"]) if grid and "batch_norm" in behind else None
        affine = affine or Affine.identity(len(weight.integers))
        scaled = folded(weight, affine.after(bias), x.on_grid, grid, rounding != "nearest")
        if scaled.error and grid is None:
            return None
        target: list[int] = []
        if grid:  # a mask of constant size clips to the grid itself
            kept: Any = behind["mask"].args[1] if "mask" in behind else None
            masked = kept is not None and all(isinstance(n, int) for n in kept.meta["val"].shape)
            ends = (-grid.zero, 255 - grid.zero) if masked else (grid.low, grid.high)
            target = [grid.decimal, *ends, grid.zero]
        why = f"weights rounded by at most {scaled.error:.2g} of a channel's largest" if scaled.error else ""
        self.note(site_of(node), "integer" if grid else "integer, result in float32", why)
        integers = self.attribute(scaled.integers, "weight")
        if needs_unsigned(scaled.integers, x.on_grid.high + x.zero):
            self.result.unsigned.add(str(integers.target))
        shape, source = node.meta["val"].shape, x.node
        if linear and len(shape) > 2:
            source = self.call(torch.flatten, source, 0, -2)
        tensors = integers, self.attribute(scaled.scale), self.attribute(scaled.bias)
        made = self.call(ops.integer_layer.default, source, *tensors, window, [x.on_grid.decimal, x.zero, *target])
        if linear and len(shape) > 2:
            made = self.call(torch.reshape, made, [-1, *shape[1:]])
        value = Value(made, grid, True, grid.zero) if grid else Value(made)
        self.made |= {behind[kind]: value for kind in ("batch_norm", "clip") if grid and kind in behind}
        return value

    def grid_behind(self, behind: dict[str, fx.Node]) -> tuple[FixedPoint, str] | None:
        """Return the grid of a layer's output and its rounding; None where integers cannot round so."""
        norm, last = behind.get("batch_norm"), behind["last"]
        bounds = bounds_of(behind["clip"]) if "clip" in behind else None
        if norm is not None and affine_of(norm) is None:
            return None
        if "grid" in behind:
            a, grid = arguments(behind["grid"]), self.grid_of(behind["grid"]).clipped(bounds)
            possible = grid and a["bits"] <= 8 and (a["rounding"] != "trunc" or grid.low >= 0)
            return (grid, a["rounding"]) if grid and possible else None
        readers = [
            reader for reader in last.users if operation(reader) not in READ_AS_INTEGERS and not bounds_of(reader)
        ]
        if norm is None or norm.name not in self.calibration or readers or not last.users:
            return None
        grid = FixedPoint.signed(CALIBRATED_BITS, self.calibration[norm.name]).clipped(bounds)
        if grid is None:
            return None
        self.note(site_of(norm), "grid", f"added: 8 bits, {grid.decimal} decimal bits; trained without one")
        return replace(grid, low=0) if only_relus_read(last) else grid, "nearest"

    def note(self, path: str, kernel: str, why: str = "") -> None:
        """Record how a layer is computed, and why not in integers."""
        self.result.notes.append({"path": path, "kernel": kernel, "why": why})

    handlers: ClassVar[dict[str, Callable[..., Value]]] = {
        **dict.fromkeys((*CONVOLUTIONS, "conv_transpose2d", "linear"), layer),
        **dict.fromkeys(("adaptive_avg_pool2d", "avg_pool2d", "mean"), averaged),
        **dict.fromkeys(REARRANGING, rearranged),
        **dict.fromkeys(("clamp", "clamp_min", "hardtanh", "relu", "relu6"), clipped),
        **dict.fromkeys(("constant_pad_nd", "repeat"), moved),
        **dict.fromkeys(("sigmoid", "silu", "tanh"), smooth),
        "add": added,
        "batch_norm": normed,
        "cat": joined,
        "grid": rounded,
        "mask": masked,
        "pad": padded,
    }


def _finer(grids: Sequence[FixedPoint]) -> list[FixedPoint]:
    """Return all grids with the most fraction bits of any."""
    finest = max(grid.decimal for grid in grids)
    return [
        FixedPoint(finest, grid.low << (finest - grid.decimal), grid.high << (finest - grid.decimal)) for grid in grids
    ]


def _window(node: fx.Node, weight: GridWeight) -> list[int] | None:
    """Return strides, paddings, dilations and groups of a convolution; [] for a linear layer; None for others."""
    if operation(node) not in CONVOLUTIONS:
        return [] if operation(node) == "linear" else None
    a, kernel = arguments(node), weight.integers.shape[2:]
    padding = a["padding"]
    if isinstance(padding, str):
        total = [d * (k - 1) * (padding == "same") for d, k in zip(a["dilation"], kernel, strict=False)]
        if any(n % 2 for n in total):
            return None
        padding = [n // 2 for n in total]
    return [*a["stride"], *padding, *a["dilation"], a["groups"]]


def _why_float(node: fx.Node, weight: GridWeight | None, x: Value) -> str:
    """Return why a layer is computed on floats."""
    if "transpose" in operation(node):
        return "a transposed convolution, for which onnxruntime has no integer kernel"
    if weight is None:
        return "its weight is on no grid"
    if x.grid is None:
        return "its input is on no grid"
    if weight.bits > 8:
        return "its weight has more than 8 bits"
    if not x.stored:
        return "its input has more than 8 bits"
    if operation(node) == "linear":
        return "its weights have one scale per input channel"
    return "no 8-bit grid follows its sums at once, and floats are faster"
