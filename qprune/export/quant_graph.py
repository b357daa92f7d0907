"""Rewrite a traced network so that a file of Quant nodes computes it in every bit.

Numbers on power-of-two grids are integers times one scale, which float32 adds in any order without an error up to 24
bits. What follows such sums is written in operations that IEEE 754 rounds once, in one way: a bias as a sum, a norm as
a product and a sum, a tanh or sigmoid before a grid as comparisons with the inputs where its next number begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from qprune.compression.functional import fake_quantize
from qprune.export.fixed_point import EXACT_BITS, affine_of
from qprune.export.integer_program import CONVOLUTIONS, REARRANGING
from qprune.export.trace import arguments, averaged_values, operation, site_of

LAYERS = (*CONVOLUTIONS, "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")
_RISING = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}
_KEEP_THE_GRID = (*REARRANGING, "mask", "relu")
_ROUND_ONCE = ("add", "clamp", "clamp_min", "hardtanh", "mul", "relu6", "sub")
_EXACT = ("cat", "constant_pad_nd", "floordiv", "mod", "narrow", "neg", "pad", "repeat", "sym_size")  # or of sizes
_LARGEST_FLOAT = 0x7F7FFFFF  # its bits


@torch.library.custom_op("qprune::thresholds", mutates_args=())
def thresholds(x: Tensor, begins: Tensor, bits: int, decimal: int, lowest: int) -> Tensor:
    """Return (lowest + how many of `begins` (1, K) lie at or below x) * 2^-decimal."""
    return (torch.bucketize(x.contiguous(), begins[0], right=True) + lowest) * 2.0**-decimal


thresholds.register_fake(lambda x, begins, bits, decimal, lowest: torch.empty_like(x))


def rewrite(traced: fx.GraphModule) -> str:
    """Rewrite a network in place; return which operation may round otherwise elsewhere, or an empty text."""
    relu_before_grid(traced)
    for node in list(traced.graph.nodes):
        name, given = operation(node), node.args
        affine = affine_of(node) if name == "batch_norm" else None
        if affine is not None:
            node.target, node.args = torch.ops.aten.mul.Tensor, (given[0], _by_channel(node, affine.factor))
            _add_behind(node, affine.shift)
        elif name in LAYERS and len(given) > 2 and getattr(given[2], "op", "") == "get_attr":
            node.args = (*given[:2], None, *given[3:])
            _add_behind(node, attrgetter(given[2].target)(traced))
        elif name == "grid" and operation(given[0]) in _RISING and len(given[0].users) == 1:
            begins, lowest = _begins(_RISING[operation(given[0])], *given[1:4])
            node.target = torch.ops.qprune.thresholds.default
            node.args = (given[0].args[0], _constant(node, begins[None]), *given[1:3], lowest)
            traced.graph.erase_node(given[0])
    traced.recompile()
    return _inexact(traced)


def relu_before_grid(traced: fx.GraphModule) -> None:
    """Move a ReLU that alone reads a grid before it: the same numbers, without a sign, in one bit less."""
    for grid in list(traced.graph.nodes):
        readers = list(grid.users)
        if operation(grid) != "grid" or not readers or any(operation(reader) != "relu" for reader in readers):
            continue
        with traced.graph.inserting_before(grid):
            relu = traced.graph.call_function(torch.ops.aten.relu.default, grid.args[:1])
        grid.args = (relu, *grid.args[1:5], False)
        for reader in readers:
            reader.replace_all_uses_with(grid)
            traced.graph.erase_node(reader)
    traced.recompile()


def _constant(node: fx.Node, value: Tensor) -> fx.Node:
    """Return a new constant of the graph, before `node`."""
    module: Any = node.graph.owning_module
    name = f"constant_{len(list(module.named_buffers(remove_duplicate=False)))}"
    module.register_buffer(name, value.detach().float())
    with node.graph.inserting_before(node):
        return node.graph.get_attr(name)


def _by_channel(node: fx.Node, value: Tensor) -> fx.Node:
    dims = 0 if operation(node) == "linear" else node.meta["val"].dim() - 2
    return _constant(node, value.view(-1, *[1] * dims))


def _add_behind(node: fx.Node, shift: Tensor) -> None:
    """Add a constant by channel to the result of a node."""
    constant = _by_channel(node, shift)
    with node.graph.inserting_after(node):
        made = node.graph.call_function(torch.ops.aten.add.Tensor, (node, constant))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)


def _begins(function: Callable[[Tensor], Tensor], bits: int, decimal: int, rounding: str) -> tuple[Tensor, int]:
    """Return the least float32 for each number of a grid that a rising function takes, but the lowest; and that one.

    Bisects the ordered bits of float32; the function is computed in float64.
    """

    def number(x: Tensor) -> Tensor:
        return fake_quantize(function(x.double()).float(), bits, decimal, rounding) * 2.0**decimal

    def float_of(rank: Tensor) -> Tensor:
        return rank.sign() * rank.abs().int().view(torch.float32)

    lowest, highest = (int(n) for n in number(torch.tensor([-math.inf, math.inf])))
    wanted = torch.arange(lowest + 1, highest + 1)
    low, high = torch.full_like(wanted, -_LARGEST_FLOAT), torch.full_like(wanted, _LARGEST_FLOAT)
    while bool((high - low > 1).any()):
        middle = (low + high).div(2, rounding_mode="floor")
        reached = number(float_of(middle)) >= wanted
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return float_of(high), lowest


def _inexact(traced: fx.GraphModule) -> str:
    """Return which operation's result may depend on the order of sums or on a library, or an empty text."""
    bits: dict[Any, int] = {}  # of what lies on one grid
    for node in traced.graph.nodes:
        x: Any = node.args[0] if node.args else None
        name, fits = operation(node), True
        if name in ("grid", "thresholds", "weight"):
            bits[node] = arguments(node)["bits"]
        elif name in _KEEP_THE_GRID and x in bits:
            bits[node] = bits[x]
        elif name in LAYERS:
            fits = {x, node.args[1]} <= bits.keys() and _largest_sum(node.args[1], name) << (bits[x] - 1) <= 1 << 24
        elif name in ("adaptive_avg_pool2d", "avg_pool2d", "mean"):
            count = averaged_values(node)
            divisor = arguments(node).get("divisor_override") or count
            bits[node] = bits.get(x, EXACT_BITS + 1) + (count - 1).bit_length()
            fits = divisor.bit_count() == 1 and bits[node] <= EXACT_BITS
        else:
            once = node.kwargs.get("alpha", 1) == 1  # others multiply and add in one or two roundings
            fits = once and name in ("", *_KEEP_THE_GRID, *_ROUND_ONCE, *_EXACT)
        if not fits:
            place = f" at {site_of(node)}" if node.name != site_of(node) else ""
            return f"{name}{place} is not known to be exact in float32, so runtimes may round it differently"
    return ""


def _largest_sum(weight: fx.Node, layer: str) -> int:
    """Return the largest sum of magnitudes of a weight's integers that one output adds."""
    given: Any = weight.args
    values = attrgetter(given[0].target)(weight.graph.owning_module).double().abs()
    rows = values.movedim(int("transpose" in layer), 0).flatten(1).sum(1)
    return int((rows * torch.exp2(torch.tensor(given[1]).double())).max())
