"""Trace a compressed network into a graph of torch's operations, with its own operators as single nodes.

Three custom operators carry the numbers of a compressed network through `torch.export`: `grid` and `mask` for features,
`weight` for a weight on its grid. Each form of file says what they become; torch's exporter translates the rest.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map

from qprune.compression.convert import with_plain_weights
from qprune.compression.fake_quantize import power_of_two, shaped_along
from qprune.compression.functional import fake_quantize
from qprune.compression.operator import Operator
from qprune.compression.plan import weight_place
from qprune.compression.prepare import find_operators, tensors_in, weight_path
from qprune.compression.pruner import Pruner, tile_mask
from qprune.compression.quantizer import Quantizer
from qprune.errors import UserError

IDENTITIES = ("alias", "clone", "contiguous", "detach", "lift_fresh_copy")
_CASTS, _DROPOUTS = ("_to_copy", "to", "type_as"), ("alpha_dropout", "dropout", "feature_dropout")


@torch.library.custom_op("qprune::grid", mutates_args=())
def grid(x: Tensor, bits: int, decimal: int, rounding: str, site: str, signed: bool = True) -> Tensor:
    """Return a feature on its grid (Eq. 1), or on the part from 0 on."""
    return fake_quantize(x if signed else x.relu(), bits, decimal, rounding)


@torch.library.custom_op("qprune::mask", mutates_args=())
def mask(x: Tensor, kept: Tensor, site: str) -> Tensor:
    """Return a feature times its mask (Eq. 3)."""
    return x * kept.to(x.dtype)


@torch.library.custom_op("qprune::weight", mutates_args=())
def weight(integers: Tensor, decimal: list[int], axis: int, bits: int) -> Tensor:
    """Return a weight: integers * 2^-decimal, decimal along `axis` (-1: one for all), or what has these values."""
    if integers.is_floating_point():
        return integers.clone()
    shaped = shaped_along(torch.tensor(decimal if axis >= 0 else decimal[0]), integers, axis if axis >= 0 else None)
    return integers.float() * power_of_two(-shaped)


grid.register_fake(lambda x, bits, decimal, rounding, site, signed=True: torch.empty_like(x))
mask.register_fake(lambda x, kept, site: torch.empty_like(x))
weight.register_fake(lambda integers, decimal, axis, bits: torch.empty_like(integers, dtype=torch.float32))


@dataclass(frozen=True)
class GridWeight:
    """A weight on its grid: real = integers * 2^-decimal.

    integers: int32, in the layer's shape. decimal: int32, broadcasts with integers. axis: the dimension with a d of its
    own per index, or None.
    """

    integers: Tensor
    decimal: Tensor
    bits: int
    axis: int | None = None

    @property
    def finest(self) -> int:
        """The most fraction bits of any part."""
        return int(self.decimal.max())

    @property
    def on_one_grid(self) -> GridWeight:
        """The same values with one d for all, the finest, and more bits."""
        decimal = torch.full([1] * self.integers.dim(), self.finest, dtype=torch.int32)
        return GridWeight(self.on_finest.int(), decimal, self.bits + self.finest - int(self.decimal.min()))

    @property
    def on_finest(self) -> Tensor:
        """Integers (int64) on the grid 2^-finest, perhaps wider than `bits`."""
        return self.integers.long() << (self.finest - self.decimal).long()


@torch.no_grad()
def quantized_weights(network: nn.Module) -> dict[str, GridWeight]:
    """Return the weights that lie on a grid, by their site."""
    found = {}
    for placed in find_operators(network):
        quantizer = placed.operator
        if placed.chain is None or not isinstance(quantizer, Quantizer) or not quantizer.acts:
            continue
        layer, name = weight_place(network, placed.path)
        value = getattr(layer, name)
        axis = quantizer.axis if quantizer.fraction_bits.dim() else None
        decimal = shaped_along(quantizer.fraction_bits, value, axis)
        scaled = value.double() * power_of_two(decimal, torch.float64)
        assert torch.equal(scaled.round(), scaled), f"the weight of {placed.path} is not on its grid"
        found[placed.path] = GridWeight(scaled.to(torch.int32), decimal.to(torch.int32), quantizer.bits, axis)
    return found


class _StoredWeight(nn.Module):
    """Parametrization of a weight that is stored as integers, or as values that it says the grid of."""

    def __init__(self, stored: GridWeight) -> None:
        super().__init__()
        self.decimal, self.bits = stored.decimal.flatten().tolist(), stored.bits
        self.axis = -1 if stored.axis is None else stored.axis

    def forward(self, integers: Tensor) -> Tensor:
        return torch.ops.qprune.weight(integers, self.decimal, self.axis, self.bits)  # type: ignore[no-any-return]


def with_custom_operators(network: nn.Module, stored_as: str = "integers") -> nn.Module:
    """Return a copy, in evaluation mode, in which active operators are the custom operators above.

    Args:
        network: A compressed network.
        stored_as: What weights are stored as: `integers`; `values`, with one grid per output channel or one for all;
            or `values of one grid`.

    Raises:
        UserError: The network has no operators, as after `convert`.
    """
    if not any(find_operators(network)):
        raise UserError(
            f"{type(network).__name__} has no operators of qprune: give the compressed network itself, not what "
            "convert made of it, or write form='float'"
        )
    copied = with_plain_weights(network).eval()
    for placed in find_operators(copied):
        if placed.operator.active:
            _make_custom(placed.operator, placed.path)
    for path, stored in quantized_weights(network).items():
        layer, name = weight_place(copied, path)
        value = stored.integers.to(torch.int8 if stored.bits <= 8 else torch.int16)
        if stored_as != "integers":
            outputs = None, int(getattr(layer, "transposed", False))
            stored = stored if stored.axis in outputs and stored_as == "values" else stored.on_one_grid
            value = getattr(layer, name).detach()
        setattr(layer, name, nn.Parameter(value, requires_grad=False))
        parametrize.register_parametrization(layer, name, _StoredWeight(stored), unsafe=True)
    return copied


def _make_custom(operator: Operator, site: str) -> None:
    """Compute an operator of a feature by a custom operator."""
    decimal = int(operator.fraction_bits) if isinstance(operator, Quantizer) else 0

    def call(_module: nn.Module, _args: Any, x: Tensor) -> Tensor:
        if isinstance(operator, Pruner):
            fixed = operator.granularity != "element" or all(isinstance(size, int) for size in x.shape[2:])
            kept = operator.fitted(x) if fixed else tile_mask(operator.mask, tuple(x.shape[2:]), operator.border)
            return torch.ops.qprune.mask(x, kept, site)  # type: ignore[no-any-return]
        return torch.ops.qprune.grid(x, operator.bits, decimal, operator.rounding, site)  # type: ignore[no-any-return]

    operator.active = False
    operator.register_forward_hook(call)


@dataclass(frozen=True)
class Inputs:
    """Example inputs of a network as `torch.export` takes them.

    Attributes:
        args, kwargs: Arguments, with two samples where the example has one: `torch.export` takes a size of one for a
            constant.
        any_size: Whether dimensions from 2 on are free, and not the batch alone.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    any_size: bool = False

    @classmethod
    def of(cls, example: Any, any_size: bool = False) -> Inputs:
        """Return the inputs for a tensor, a tuple of arguments or a dict of arguments by name."""
        if all(tensor.shape[:1] == (1,) for tensor in tensors_in(example)):
            example = tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) else x, example)
        if isinstance(example, dict):
            return cls((), example, any_size)
        return cls(example if isinstance(example, tuple) else (example,), {}, any_size)

    @property
    def leaves(self) -> tuple[Any, ...]:
        """All values, in order."""
        return tuple(tree_leaves((self.args, self.kwargs)))

    @property
    def flat(self) -> Inputs:
        """The same for a network that takes leaves."""
        return Inputs(self.leaves, {}, self.any_size)

    @property
    def shapes(self) -> Any:
        """The dynamic shapes of `torch.export`."""

        def free(x: Any) -> dict[int, Any] | None:
            dims = [0, *range(2, x.dim() if self.any_size else 0)] if isinstance(x, Tensor) and x.dim() else []
            return dict.fromkeys(dims, torch.export.Dim.AUTO) or None

        return tree_map(free, self.kwargs or self.args)


@torch.no_grad()
def trace(network: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """Return the operations of a network in evaluation mode, none of them in place, from leaves to a tuple of leaves.

    Raises:
        UserError: `torch.export` cannot follow the forward pass; its reason is in the message.
    """
    try:
        program = torch.export.export(network, inputs.args, inputs.kwargs, dynamic_shapes=inputs.shapes)
        traced: fx.GraphModule = program.run_decompositions({}).module(check_guards=False)
    except Exception as error:  # torch.export raises many classes
        raise cannot(type(network).__name__, "torch.export", error) from error
    traced.graph.set_codegen(fx.graph.CodeGen())
    for node in list(traced.graph.nodes):
        if operation(node) == "_native_batch_norm_legit_no_training":
            _restore_norm(node)
    _fold_constants(traced)
    return fx.GraphModule(traced, traced.graph).eval()  # without the hook that checks arguments as they were


def _fold_constants(traced: fx.GraphModule) -> None:
    """Compute what depends on constants alone, as masks do, but for weights from their integers."""
    constants = {}
    for node in list(traced.graph.nodes):
        sources = {*node.all_input_nodes}
        if operation(node).startswith("_assert"):
            traced.graph.erase_node(node)
        elif node.op == "get_attr":
            constants[node] = attrgetter(str(node.target))(traced).detach()
        elif sources and operation(node) not in ("", "weight") and constants.keys() >= sources:
            args, kwargs = map_arg((node.args, node.kwargs), lambda each: constants[each])
            folded = constants[node] = node.target(*args, **kwargs)
            if not isinstance(folded, Tensor):  # several, which others take apart
                continue
            traced.register_buffer(f"{node.name}_folded", folded)
            with traced.graph.inserting_before(node):
                constant = traced.graph.get_attr(f"{node.name}_folded")
            constant.meta, constants[constant] = node.meta, folded
            node.replace_all_uses_with(constant)
    traced.graph.eliminate_dead_code()


def _restore_norm(node: fx.Node) -> None:
    """Put a batch norm back in the place of what it was decomposed to, which returns a tuple."""
    *given, momentum, eps = node.args
    for reader in list(node.users):  # `getitem` of 0 alone
        with node.graph.inserting_after(node):
            norm = node.graph.call_function(torch.ops.aten.batch_norm.default, (*given, False, momentum, eps, False))
        norm.meta = dict(reader.meta)
        reader.replace_all_uses_with(norm)
        node.graph.erase_node(reader)
    node.graph.erase_node(node)


def cannot(network: str, exporter: str, error: Exception) -> UserError:
    """Return the error for a network that torch cannot export, with the first line of torch's reason."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
    return UserError(f"{network} cannot be exported: {exporter} says {reason!r}")


def operation(node: fx.Node) -> str:
    """Return the name of a node's operation, without namespace and overload; empty for inputs and constants."""
    if node.op != "call_function":
        return ""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet)).rpartition(".")[2]


def arguments(node: fx.Node) -> Mapping[str, Any]:
    """Return the arguments of an operation by name, with defaults."""
    module = node.graph.owning_module
    assert module is not None
    normalized = node.normalized_arguments(module, normalize_to_only_use_kwargs=True)
    return {} if normalized is None else normalized.kwargs


def is_identity(node: fx.Node) -> bool:
    """Whether the operation returns its input in evaluation."""
    name = operation(node)
    if name in _DROPOUTS:
        return not node.args[2]
    same = name in _CASTS and node.meta["val"].dtype == node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    return name in IDENTITIES or same


def bounds_of(node: fx.Node) -> tuple[float, float] | None:
    """Return the bounds of an operation that clips, or None."""
    name, infinity = operation(node), float("inf")
    if name in ("relu", "relu6"):
        return 0.0, 6.0 if name == "relu6" else infinity
    if name not in ("clamp", "clamp_min", "hardtanh"):
        return None
    a = arguments(node)
    low, high = (a.get(f"{end}_val" if name == "hardtanh" else end) for end in ("min", "max"))
    if any(isinstance(bound, fx.Node) for bound in (low, high)):
        return None
    return -infinity if low is None else float(low), infinity if high is None else float(high)


def averaged_values(node: fx.Node) -> int:
    """Return how many values each average of a pooling or a mean adds; 0 where the number varies or is not known."""
    a, x = arguments(node), node.args[0].meta["val"]  # type: ignore[union-attr]
    if operation(node) == "avg_pool2d":
        sizes = [0] if any(a["padding"]) or a["ceil_mode"] else (list(a["kernel_size"]) * 2)[:2]
    elif operation(node) == "mean":
        sizes = [x.shape[dim] for dim in a.get("dim") or range(x.dim())]
    else:
        sizes = x.shape[2:] if list(a["output_size"]) == [1, 1] else [0]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else 0


def followers(layer: fx.Node) -> dict[str, fx.Node]:
    """Return `batch_norm`, `clip`, `mask`, `grid` and `last`, where each is the only reader of the one before."""
    found = {"last": layer}
    for kind in ("batch_norm", "clip", "mask", "grid"):
        readers = list(found["last"].users)
        while len(readers) == 1 and readers[0].op == "call_function" and is_identity(readers[0]):
            readers = list(readers[0].users)
        if len(readers) == 1 and (operation(readers[0]) == kind or (kind == "clip" and bounds_of(readers[0]))):
            found[kind] = found["last"] = readers[0]
    return found


def only_relus_read(node: fx.Node) -> bool:
    """Whether only ReLUs read the node, so that negative values can go."""
    bounds = [bounds_of(reader) for reader in node.users]
    return bool(bounds) and all(pair is not None and pair[0] >= 0 for pair in bounds)


def site_of(layer: fx.Node) -> str:
    """Return the path of a layer by that of its first constant, or its own name."""
    for node in layer.all_input_nodes:
        node = node.all_input_nodes[0] if operation(node) == "weight" else node
        if node.op == "get_attr":
            path = str(node.target)
            return weight_path(path) if ".parametrizations." in f".{path}" else path.rpartition(".")[0]
    return layer.name


@torch.no_grad()
def run_and_keep(module: fx.GraphModule, inputs: Sequence[Any], nodes: Collection[fx.Node]) -> dict[fx.Node, Tensor]:
    """Run a graph; return the values of `nodes`."""
    interpreter = fx.Interpreter(module, garbage_collect_values=False)
    interpreter.run(*inputs)
    return {node: interpreter.env[node] for node in nodes}
