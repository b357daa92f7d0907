"""From a trace to a program of integer kernels: 8-bit layers with batch norms folded into their factors.

Weights stay the whole numbers that were trained; a norm's factor goes into the scale of the layer's output channel, its
shift into an int32 bias in units of the sums. What that changes is told in the notes: a bias moves by at most half a
unit of the sums, a tensor that was trained without a grid and lies between two integer kernels gets one, and weights
whose decimal bits differ by input channel, which no integer kernel can hold, are rounded to a step per output channel.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qprune.compression.functional import integer_range
from qprune.export.floats import Round
from qprune.export.lowering import EXACT_BITS, Lowering, NotExactError, affine_of
from qprune.export.operations import Apply
from qprune.export.program import Grid, Program, Value
from qprune.export.stored import (
    FORMS,
    Form,
    IntegerSums,
    Load,
    Store,
    StoredAdd,
    StoredLayer,
    StoredMask,
    StoredRelu,
    needs_unsigned,
)
from qprune.export.tracing import Chain, Node, Trace
from qprune.export.weights import by_output

LARGEST_BIAS = 2**30
LEADS_TO_GRID = ("add", "relu", "avg_pool", "adaptive_avg_pool", "flatten", "max_pool", "concat")
STORED_MOVES = ("flatten", "reshape", "pixel_shuffle", "max_pool")


def integer_program(trace: Trace, dynamic_size: bool, ranges: Mapping[str, int], weights: str = "auto") -> Program:
    """Integer kernels where they can be, exact arithmetic elsewhere, or float32 where that is impossible too.

    ranges: decimal bits (of 8-bit grids) for features that were trained without one, by module path. weights: their
    form where `needs_unsigned`: `auto`, chosen when the file is loaded; `safe`, unsigned bytes; `signed` ones.
    """
    try:
        return IntegerLowering(trace, dynamic_size, True, ranges, weights).program()
    except NotExactError as reason:
        program = IntegerLowering(trace, dynamic_size, False, ranges, weights).program()
        program.promise = False
        program.notes.append({"path": "", "kernel": "float32", "why": f"no exact arithmetic: {reason}"})
        return program


class IntegerLowering(Lowering):
    """Layers in integers; everything else as its parent does it, on floats."""

    def __init__(
        self, trace: Trace, dynamic_size: bool, precise: bool, ranges: Mapping[str, int], weights: str
    ) -> None:
        super().__init__(trace, dynamic_size, precise)
        self.ranges, self.unsigned = ranges, FORMS[weights]

    def form(self, weight: Tensor, x: Value) -> Form:
        """How the bytes of a layer's weight are stored."""
        assert x.grid is not None
        return self.unsigned if needs_unsigned(weight, x.grid.high + x.zero) else "signed"

    def as_float(self, value: Value) -> Value:
        if value.form != "uint8":
            return value
        name = f"{value.name}.loaded"
        if name not in self.result.values:
            assert value.grid is not None
            made = Value(name, "float32", value.shape, value.grid)
            self.result.add(Load(value.grid, value.zero), [value], made)
        return self.result.values[name]

    def lower(self, node: Node) -> None:
        inputs = [self.made[name] for name in node.inputs]
        if node.op in ("conv", "linear") and self.integer_layer(node, inputs[0]):
            return
        if node.op == "grid":
            self.made[node.name] = self.stored_grid(node, inputs[0])
        elif node.op == "add" and self.stored_sum(node, inputs):
            return
        elif inputs[0].form == "uint8" and node.op == "relu":
            self.made[node.name] = self.stored_relu(node, inputs[0])
        elif inputs[0].form == "uint8" and node.op == "mask":
            self.made[node.name] = self.stored_mask(node, inputs[0], node.name)
        elif inputs[0].form == "uint8" and node.op in STORED_MOVES:
            self.made[node.name] = self.stored_move(node, inputs[0])
        else:
            super().lower(node)

    def why_float(self, node: Node, x: Value) -> str:
        reason = super().why_float(node, x)
        if reason:
            return reason
        if node.weight is not None and node.weight.bits > 8:
            return "its weight has more than 8 bits"
        if self.made[node.inputs[0]].form != "uint8":
            return "its input has more than 8 bits"
        return f"no grid follows its sums at once, {'and floats are faster' if node.op == 'conv' else 'too many bits'}"

    # Features

    def only_relu(self, node: Node) -> bool:
        """Whether everything that reads the node is a ReLU, so that what is negative need not be kept."""
        users = self.trace.users(node.name)
        return bool(users) and all(user.op == "relu" for user in users)

    def store(self, node: Node, x: Value, grid: Grid, name: str) -> Value:
        """x, which lies on `grid` or is to be rounded to it, as uint8."""
        zero = 0 if grid.low >= 0 else 128
        return self.result.add(
            Store(grid, zero), [self.cast(x, "float32")], Value(name, "uint8", node.shape, grid, zero)
        )

    def stored_grid(self, node: Node, x: Value) -> Value:
        a = node.arguments
        if a["bits"] > 8:
            return self.to_grid(node, self.as_float(x))
        grid = Grid(a["decimal"], *integer_range(a["bits"]))
        x = self.as_float(x)
        if a["rounding"] != "nearest" or x.form == "float64":
            step = Round(grid, a["bits"], a["rounding"], x.form)
            x = self.result.add(step, [x], Value(f"{node.name}.rounded", x.form, node.shape, grid))
        return self.store(node, x, self.unsigned_if(node, grid), node.name)

    def unsigned_if(self, node: Node, grid: Grid) -> Grid:
        """The grid without its negative part where only ReLUs read the node."""
        return Grid(grid.decimal, 0, grid.high) if self.only_relu(node) else grid

    def stored_relu(self, node: Node, x: Value) -> Value:
        assert x.grid is not None
        if x.grid.low >= 0:
            return x
        grid = Grid(x.grid.decimal, 0, x.grid.high)
        return self.result.add(StoredRelu(x.zero), [x], Value(node.name, "uint8", node.shape, grid, x.zero))

    def stored_mask(self, node: Node, x: Value, name: str) -> Value:
        assert x.grid is not None
        mask, dynamic = self.mask_of(node)
        step = StoredMask(mask, node.arguments["border"], dynamic, x.grid, x.zero)
        return self.result.add(step, [x], Value(name, "uint8", x.shape, x.grid, x.zero))

    def stored_move(self, node: Node, x: Value) -> Value:
        step = Apply(node.op, node.arguments, {}, "uint8")
        return self.result.add(step, [x], Value(node.name, "uint8", node.shape, x.grid, x.zero))

    def stored_sum(self, node: Node, inputs: list[Value]) -> bool:
        """An addition of stored features that a grid of 8 bits follows, rounding to nearest."""
        chain = self.trace.following(node)
        grid_node = chain.grid
        if grid_node is None or chain.norm is not None or {v.form for v in inputs} != {"uint8"}:
            return False
        a = grid_node.arguments
        if a["rounding"] != "nearest" or a["bits"] > 8:
            return False
        grid = self.unsigned_if(grid_node, Grid(a["decimal"], *integer_range(a["bits"])))
        zero = 0 if grid.low >= 0 else 128
        first, second = inputs
        assert first.grid is not None
        assert second.grid is not None
        step = StoredAdd((first.grid, second.grid), (first.zero, second.zero), grid, zero)
        value = self.result.add(step, inputs, Value(f"{node.name}.sum", "uint8", node.shape, grid, zero))
        self.finish(chain, value)
        return True

    # Layers

    def finish(self, chain: Chain, value: Value) -> None:
        """Mask a stored value as the chain does and let it stand for all of the chain's nodes."""
        if chain.mask is not None:
            value = self.stored_mask(chain.mask, value, chain.mask.name)
        for node in (chain.norm, chain.mask, chain.grid):
            if node is not None:
                self.made[node.name] = value
                self.done.add(node.name)
        assert chain.last is not None
        self.made[chain.last.name] = value
        self.done.add(chain.last.name)

    def integer_layer(self, node: Node, x: Value) -> bool:
        """Carry out a layer, and what follows it as far as possible, in integers. False: it stays a float."""
        if x.form != "uint8" or node.weight is None or node.weight.bits > 8:
            return False
        chain = self.trace.following(node)
        made = self.grid_after(node, chain)
        if made is None:
            return self.integer_sums(node, x)
        rounding = chain.grid.arguments["rounding"] if chain.grid is not None else "nearest"
        integers, decimals, error = by_output(node.weight)
        factor, shift = (
            affine_of(chain.norm)
            if chain.norm
            else (torch.ones(len(integers)).double(), torch.zeros(len(integers)).double())
        )
        if "bias" in node.tensors:
            shift = shift + node.tensors["bias"].double() * factor
        if rounding != "nearest":  # floor, and trunc where nothing negative is kept: half a step down, then nearest
            shift = shift - 0.5 * 2.0**-made.decimal
        self.stored_layer(node, x, chain, made, integers, factor * torch.exp2(-decimals.double()), shift, error)
        return True

    def grid_after(self, node: Node, chain: Chain) -> Grid | None:
        """The grid that the layer's output is rounded to, or None where rounding in integers would not be exact."""
        if chain.grid is not None:
            a = chain.grid.arguments
            if a["bits"] > 8 or (a["rounding"] == "trunc" and not self.only_relu(chain.grid)):
                return None
            return self.unsigned_if(chain.grid, Grid(a["decimal"], *integer_range(a["bits"])))
        assert chain.last is not None
        users = self.trace.users(chain.last.name)
        if chain.norm is None or not users or any(user.op not in LEADS_TO_GRID for user in users):
            return None
        path = chain.norm.path
        if path not in self.ranges:
            return None
        grid = self.unsigned_if(chain.last, Grid(self.ranges[path], -128, 127))
        self.result.notes.append(
            {"path": path, "kernel": "grid", "why": f"added: 8 bits, {grid.decimal} decimal bits; trained without one"}
        )
        return grid

    def stored_layer(
        self,
        node: Node,
        x: Value,
        chain: Chain,
        made: Grid,
        integers: Tensor,
        scale: Tensor,
        shift: Tensor,
        error: float,
    ) -> None:
        assert node.weight is not None
        assert x.grid is not None
        assert chain.last is not None
        flip = (scale < 0) & (integers.flatten(1).min(1).values > -128)
        integers = torch.where(flip.view(-1, *[1] * (integers.dim() - 1)), -integers, integers)
        real = torch.where(flip, -scale, scale)
        scale = real.float()
        unit = scale.double() * 2.0**-x.grid.decimal
        constant = (scale == 0) | (shift.abs() >= LARGEST_BIAS * unit.abs())  # the norm took the channel's sums away
        scale = torch.where(constant, torch.tensor(2.0 ** (x.grid.decimal - made.decimal)), scale)
        integers = torch.where(constant.view(-1, *[1] * (integers.dim() - 1)), 0, integers)
        bias = (
            (shift / (scale.double() * 2.0**-x.grid.decimal)).round().clamp(-LARGEST_BIAS, LARGEST_BIAS).to(torch.int32)
        )
        zero = 0 if made.low >= 0 else 128
        sums = int(integers.flatten(1).abs().sum(1).max()) * x.grid.largest
        step = StoredLayer(
            node.op,
            integers.float(),
            scale,
            bias,
            node.arguments,
            x.grid,
            x.zero,
            made,
            zero,
            node.weight.bits,
            form=self.form(integers, x),
            wide=sums >= 2**EXACT_BITS,
            clipped_later=chain.mask is not None and not (zero and self.mask_of(chain.mask)[1]),
        )
        value = Value(f"{node.name}.stored", "uint8", chain.last.shape, made, zero)
        self.note(node, "integer", f"weights rounded by at most {error:.2g} of a channel's largest" if error else "")
        self.finish(chain, self.result.add(step, [x], value))

    def integer_sums(self, node: Node, x: Value) -> bool:
        """A linear layer whose sums leave the integers: exactly, as floats, with the bias on the sums' grid."""
        if node.op != "linear":  # ConvInteger takes much longer than a float convolution, whose sums are as exact
            return False
        assert node.weight is not None
        assert x.grid is not None
        integers, decimals, error = by_output(node.weight)
        if error:
            return False  # the parent's exact sums of floats are the better answer
        bound = int(integers.flatten(1).abs().sum(1).max()) * x.grid.largest
        finest = int(decimals.max())
        bias = None
        if "bias" in node.tensors:
            unit = 2.0 ** (decimals.double() + x.grid.decimal)
            real = (node.tensors["bias"].double() * unit).round()
            bound += int(real.abs().max())
            bias = real.float()
        if bound << (finest - int(decimals.min())) >= 2**EXACT_BITS:
            return False
        bound <<= finest - int(decimals.min())
        same = decimals[:1] if bool((decimals == decimals[0]).all()) else decimals
        form = self.form(integers, x)
        step = IntegerSums(integers.float(), bias, x.grid, x.zero, same, form)
        grid = Grid(x.grid.decimal + finest, -bound, bound)
        self.note(node, "integer sums", "no grid of 8 bits follows it")
        self.made[node.name] = self.result.add(step, [x], Value(node.name, "float32", node.shape, grid))
        return True
