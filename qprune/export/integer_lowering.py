"""Lower a trace to integer kernels: 8-bit layers with batch norms folded in.

Weights stay the integers that were trained; the factor of a norm goes into the scale of the layer's output channel, its
shift into an int32 bias in units of the sums. Three things may change, and the notes list them: a bias moves by at most
half a unit of the sums; a tensor between two integer kernels that was trained without a grid gets one by calibration;
weights whose fraction bits differ by input channel, which no integer kernel takes, are requantized per output channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qprune.compression.functional import integer_range, optimal_decimal
from qprune.export import steps
from qprune.export.float_lowering import FloatLowering, affine_of, exact_if_possible, exact_program
from qprune.export.program import FixedPoint, Program, Step, Value
from qprune.export.steps import EXACT_BITS, ScaledWeight, needs_unsigned
from qprune.export.trace import POOLS, REARRANGING, Node, Trace, Weight

LARGEST_BIAS = 2**30
READ_AS_INTEGERS = ("add", "cat", "flatten", "max_pool2d", "relu", *POOLS)  # readers for which a norm is given a grid
CALIBRATED_BITS, CALIBRATED_DECIMALS = 8, range(-8, 20)


def integer_program(trace: Trace, dynamic_size: bool, calibration: Mapping[str, int], weights: str = "auto") -> Program:
    """Return the network in integer kernels where they exist, else in floats.

    Args:
        trace: The trained network.
        dynamic_size: Whether height and width of the input may differ from those of the example.
        calibration: Fraction bits of features that were trained without a grid, see `calibrate`.
        weights: Type of weights that `needs_unsigned`: `auto`, chosen when the file is loaded; `safe`, uint8; `signed`,
            int8.
    """
    return exact_if_possible(lambda exact: IntegerLowering(trace, dynamic_size, exact, calibration, weights))


def calibrate(trace: Trace, x: Tensor) -> dict[str, int]:
    """Choose fraction bits on the batch x for batch norms that no grid follows.

    Returns:
        Name of the norm's node -> fraction bits.
    """
    program, found = exact_program(trace, dynamic_size=False), {}
    behind = {node.name: trace.followers(node) for node in trace.nodes if node.op == "batch_norm"}
    values = {name: program.nodes[nodes["last"].name].name for name, nodes in behind.items() if "grid" not in nodes}
    tensors = program.run(x, list(values.values()))
    for name, value in values.items():
        flat = tensors[value].float().flatten()
        found[name] = int(optimal_decimal(flat, CALIBRATED_BITS, decimals=CALIBRATED_DECIMALS, rounding="nearest"))
    return found


def requantized_per_channel(weight: Weight) -> tuple[Tensor, Tensor, float]:
    """Return integers (out, ...) and fraction bits (out,) per output channel.

    The third value is the largest change of a weight, as a fraction of the largest in its channel: 0 unless fraction
    bits differ by input channel.
    """
    rows = weight.on_finest.flatten(1).double()
    low, high = integer_range(weight.bits)
    integers, shift = rows, torch.zeros(len(rows), dtype=torch.int64)
    while bool((wide := (integers.amin(1) < low) | (integers.amax(1) > high)).any()):
        shift += wide
        integers = torch.round(rows / 2 ** shift[:, None])
    change = (integers * 2 ** shift[:, None] - rows).abs().amax(1) / rows.abs().amax(1).clamp(min=1)
    return integers.view(weight.integers.shape).to(torch.int32), weight.finest - shift, float(change.max())


def _feature(name: str, shape: tuple[int, ...], grid: FixedPoint) -> Value:
    return Value(name, "uint8", shape, grid, 0 if grid.low >= 0 else 128)


class IntegerLowering(FloatLowering):
    """Layers and 8-bit features in integers; everything else on floats."""

    def __init__(
        self, trace: Trace, dynamic_size: bool, exact: bool, calibration: Mapping[str, int], weights: str
    ) -> None:
        super().__init__(trace, dynamic_size, exact)
        self.calibration, self.weights = calibration, weights

    def lower(self, node: Node, inputs: list[Value]) -> None:
        x, stored = inputs[0], {value.dtype for value in inputs} == {"uint8"}
        if node.op == "grid" and node.arguments["bits"] <= 8:
            self.made[node.name] = self.quantized(node, self.as_float(x))
        elif stored and node.op == "relu" and x.on_grid.low >= 0:
            self.made[node.name] = x
        elif stored and node.op == "relu":
            step = Step(torch.relu, lambda graph, name: graph.node("Max", name, graph.constant(x.zero_point, "uint8")))
            output = replace(x, name=node.name, grid=replace(x.on_grid, low=0))
            self.made[node.name] = self.result.add(step, [x], output)
        elif stored and node.op == "mask":
            self.made[node.name] = self.masked(node, x)
        elif stored and node.op in REARRANGING:
            output = replace(x, name=node.name, shape=node.shape)
            self.made[node.name] = self.result.add(steps.traced_operation(node, "uint8"), [x], output)
        elif not (stored and (self.layer_in_integers(node, x) or self.addition(node, inputs))):
            super().lower(node, inputs)

    def why_float(self, node: Node, x: Value) -> str:
        reason = super().why_float(node, x)
        if reason or node.weight is None:
            return reason
        if node.weight.bits > 8:
            return "its weight has more than 8 bits"
        if self.made[node.inputs[0]].dtype != "uint8":
            return "its input has more than 8 bits"
        consequence = "and floats are faster" if node.op == "conv2d" else "too many bits"
        return f"no grid follows its sums at once, {consequence}"

    def only_relus_read(self, node: Node) -> bool:
        """Whether only ReLUs read the node, so that negative values can go."""
        readers = self.trace.readers(node.name)
        return bool(readers) and all(reader.op == "relu" for reader in readers)

    def grid_of(self, node: Node) -> FixedPoint:
        """Return the grid of a quantizer, from 0 on where only ReLUs read it."""
        grid = FixedPoint.signed(node.arguments["bits"], node.arguments["decimal"])
        return replace(grid, low=0) if self.only_relus_read(node) else grid

    def quantized(self, node: Node, x: Value) -> Value:
        """Convert a float to uint8 on the grid of `node`."""
        if node.arguments["rounding"] != "nearest" or x.dtype == "float64":
            x = self.rounded(node, x)
        output = _feature(node.name, node.shape, self.grid_of(node))
        return self.result.add(steps.quantize_feature(output), [x], output)

    def masked(self, node: Node, x: Value) -> Value:
        return self.result.add(steps.mask_feature(self.mask_of(node), x), [x], replace(x, name=node.name))

    def addition(self, node: Node, inputs: list[Value]) -> bool:
        """Add two uint8 features if an 8-bit grid follows; return whether it was done."""
        behind = self.trace.followers(node)
        grid = behind.get("grid")
        if node.op != "add" or grid is None or "batch_norm" in behind:
            return False
        if grid.arguments["rounding"] != "nearest" or grid.arguments["bits"] > 8:
            return False
        output = _feature(f"{node.name}.sum", node.shape, self.grid_of(grid))
        self.finish(behind, self.result.add(steps.quantize_feature(output, *inputs), inputs, output))
        return True

    def finish(self, behind: dict[str, Node], value: Value) -> None:
        """Apply the mask behind an integer kernel; all fused nodes get its value."""
        if "mask" in behind:
            value = self.masked(behind["mask"], value)
        self.made |= {node.name: value for node in behind.values()}

    def layer_in_integers(self, node: Node, x: Value) -> bool:
        """Compute a layer and what follows in integers; return whether it was done."""
        if node.op not in ("conv2d", "linear") or node.weight is None or node.weight.bits > 8:
            return False
        behind = self.trace.followers(node)
        grid = self.grid_behind(behind)
        if grid is None:
            return node.op == "linear" and self.sums_in_integers(node, node.weight, x)  # ConvInteger is slow
        weight, error = self.folded(node, behind, x, grid)
        why = f"weights rounded by at most {error:.2g} of a channel's largest" if error else ""
        self.result.note(node.path, "integer", why)
        output = _feature(f"{node.name}.stored", behind["last"].shape, grid)
        masked = "mask" in behind and not (output.zero_point and self.mask_of(behind["mask"]).dynamic)
        self.finish(behind, self.result.add(steps.integer_layer(node, weight, x, output, masked), [x], output))
        return True

    def grid_behind(self, behind: dict[str, Node]) -> FixedPoint | None:
        """Return the grid of a layer's output; None where integers cannot round so."""
        last = behind["last"]
        if "grid" in behind:
            bits, rounding = (behind["grid"].arguments[key] for key in ("bits", "rounding"))
            possible = bits <= 8 and (rounding != "trunc" or self.only_relus_read(behind["grid"]))
            return self.grid_of(behind["grid"]) if possible else None
        readers, norm = self.trace.readers(last.name), behind.get("batch_norm")
        if norm is None or norm.name not in self.calibration:
            return None
        if not readers or any(reader.op not in READ_AS_INTEGERS for reader in readers):
            return None
        grid = FixedPoint.signed(CALIBRATED_BITS, self.calibration[norm.name])
        self.result.note(norm.path, "grid", f"added: 8 bits, {grid.decimal} decimal bits; trained without one")
        return replace(grid, low=0) if self.only_relus_read(last) else grid

    def folded(self, node: Node, behind: dict[str, Node], x: Value, grid: FixedPoint) -> tuple[ScaledWeight, float]:
        """Fold the norm into scale and bias; return the weight and its rounding error."""
        assert node.weight is not None
        integers, decimals, error = requantized_per_channel(node.weight)
        ones = torch.ones(len(integers), dtype=torch.float64)
        factor, shift = affine_of(behind["batch_norm"]) if "batch_norm" in behind else (ones, 0 * ones)
        if "bias" in node.tensors:
            shift = shift + node.tensors["bias"].double() * factor
        if "grid" in behind and behind["grid"].arguments["rounding"] != "nearest":
            shift = shift - 0.5 * grid.scale  # floor (and trunc of what is not negative) by rounding to nearest
        scale = factor * torch.exp2(-decimals.double())
        by_channel = (-1, *[1] * (integers.dim() - 1))
        # A scale is positive where the type of the bytes holds the negated weights.
        lowest = -8 if node.weight.bits <= 4 else -128
        flip = (scale < 0) & (integers.flatten(1).min(1).values > lowest)
        integers = torch.where(flip.view(by_channel), -integers, integers)
        scale = torch.where(flip, -scale, scale).float()
        # A channel whose norm has a factor of about zero is its bias alone.
        unit = scale.double() * x.on_grid.scale
        constant = (scale == 0) | (shift.abs() >= LARGEST_BIAS * unit.abs())
        integers = torch.where(constant.view(by_channel), 0, integers)
        scale = torch.where(constant, torch.tensor(grid.scale / x.on_grid.scale), scale)
        bias = (shift / (scale.double() * x.on_grid.scale)).round().clamp(-LARGEST_BIAS, LARGEST_BIAS).to(torch.int32)
        return ScaledWeight(integers.float(), scale, bias, node.weight.bits, self.weight_type(integers, x)), error

    def weight_type(self, integers: Tensor, x: Value) -> str:
        return self.weights if needs_unsigned(integers, x.on_grid.high + x.zero_point) else "signed"

    def sums_in_integers(self, node: Node, weight: Weight, x: Value) -> bool:
        """Compute the exact sums of a linear layer, its bias rounded to their grid."""
        integers, decimals, error = requantized_per_channel(weight)
        if error:
            return False  # the exact sums of floats keep the weights as they are
        bound, bias = int(integers.flatten(1).abs().sum(1).max()) * x.on_grid.largest, None
        if "bias" in node.tensors:
            bias = (node.tensors["bias"].double() * torch.exp2(decimals + x.on_grid.decimal).double()).round()
            bound += int(bias.abs().max())
        finest = int(decimals.max())
        bound <<= finest - int(decimals.min())
        if bound >= 2**EXACT_BITS:
            return False
        scale = torch.exp2(-decimals.float())
        scale = scale[:1] if bool((scale == scale[0]).all()) else scale
        units = None if bias is None else bias.to(torch.int32)
        scaled = ScaledWeight(integers.float(), scale, units, 8, self.weight_type(integers, x))
        output = Value(node.name, "float32", node.shape, FixedPoint(x.on_grid.decimal + finest, -bound, bound))
        self.made[node.name] = self.result.add(steps.integer_sums(scaled, x), [x], output)
        self.result.note(node.path, "integer sums", "no grid of 8 bits follows it")
        return True
