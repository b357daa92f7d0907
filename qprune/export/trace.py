"""Trace a compressed network into a flat list of operations.

Weights are integers with scales; masks and grids are operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from qprune.compression.convert import with_plain_weights
from qprune.compression.fake_quantize import power_of_two
from qprune.compression.operator import Operator
from qprune.compression.prepare import find_operators
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer
from qprune.errors import UserError

# Names of PyTorch's operators that can be exported, in place (with an underscore behind) or not.
LAYERS = ("conv2d", "conv_transpose2d", "linear")
POOLS = ("adaptive_avg_pool2d", "avg_pool2d")
REARRANGING = ("flatten", "max_pool2d", "pixel_shuffle", "reshape", "view")  # each output element is an input element
ELEMENTWISE = ("add", "hardtanh", "leaky_relu", "relu", "relu6", "sigmoid", "tanh")
OPERATIONS = (*LAYERS, *POOLS, *REARRANGING, *ELEMENTWISE, "batch_norm", "cat", "instance_norm", "mean", "pad")
IDENTITIES = ("alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "identity")


@dataclass(frozen=True)
class Weight:
    """A weight on its grid: real = integers * 2^-decimal.

    integers: int32, in the layer's shape. decimal: int32, broadcasts with integers.
    """

    integers: Tensor
    decimal: Tensor
    bits: int

    @property
    def finest(self) -> int:
        """The most fraction bits of any part."""
        return int(self.decimal.max())

    @property
    def on_finest(self) -> Tensor:
        """Integers (int64) on the grid 2^-finest, perhaps wider than `bits`."""
        return self.integers.long() << (self.finest - self.decimal).long()


@torch.no_grad()
def quantized_weights(network: nn.Module) -> dict[str, Weight]:
    """Return the weights that lie on a grid, by the path of their layer."""
    found = {}
    for placed in find_operators(network):
        quantizer = placed.operator
        if placed.chain is None or not isinstance(quantizer, Quantizer) or not quantizer.active:
            continue
        value = network.get_submodule(placed.path).weight
        assert isinstance(value, Tensor)
        shape = [1] * value.dim()
        if quantizer.decimal.dim():
            assert quantizer.axis is not None
            shape[quantizer.axis] = -1
        decimal = quantizer.decimal.view(shape)
        scaled = value.double() * power_of_two(decimal, torch.float64)
        assert torch.equal(scaled.round(), scaled), f"the weight of {placed.path} is not on its grid"
        found[placed.path] = Weight(scaled.to(torch.int32), decimal.to(torch.int32), quantizer.bits)
    return found


@dataclass
class Node:
    """One operation of the network.

    op: PyTorch's name, or `input`, `grid` (a feature's quantizer) or `mask` (its pruner). inputs: names of nodes.
    arguments: PyTorch's, by name. tensors: constant tensors among them. shape: of the output, at the example. path: the
    module it is in. weight: of a layer, where it lies on a grid. run: the operation in PyTorch, at any batch size.
    """

    name: str
    op: str
    inputs: list[str] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    path: str = ""
    weight: Weight | None = None
    run: Callable[..., Tensor] = torch.clone

    @property
    def where(self) -> str:
        """The place of the operation, for messages."""
        return self.path or "the network"


@dataclass
class Trace:
    """Nodes in order of computation: the first is the input, `output` the last."""

    nodes: list[Node]
    output: str

    def readers(self, name: str) -> list[Node]:
        """Return the nodes that read `name`."""
        return [node for node in self.nodes if name in node.inputs]

    def followers(self, layer: Node) -> dict[str, Node]:
        """Return `batch_norm`, `mask`, `grid` and `last` behind a layer.

        Each is the only reader of the one before.
        """
        found = {"last": layer}
        for op in ("batch_norm", "mask", "grid"):
            readers = self.readers(found["last"].name)
            fused = len(readers) == 1 and readers[0].op == op and not readers[0].arguments.get("training")
            if fused and found["last"].name != self.output:
                found[op] = found["last"] = readers[0]
        return found


@torch.library.custom_op("qprune::grid", mutates_args=())
def _grid(x: Tensor, bits: int, decimal: int, rounding: str, site: str) -> Tensor:
    return x.clone()


@torch.library.custom_op("qprune::mask", mutates_args=())
def _mask(x: Tensor, mask: Tensor, border: str, site: str) -> Tensor:
    return x.clone()


_grid.register_fake(lambda x, bits, decimal, rounding, site: torch.empty_like(x))
_mask.register_fake(lambda x, mask, border, site: torch.empty_like(x))


def trace(network: nn.Module, example: Tensor) -> Trace:
    """Return the operations that `network` applies to `example` in evaluation mode.

    Raises:
        UserError: An operation or a control flow cannot be exported.
    """
    copied = with_plain_weights(network).eval()
    for placed in find_operators(copied):
        if placed.operator.active:
            _trace_as_one_operation(placed.operator, placed.path)
    try:
        program = torch.export.export(copied, (example,))
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{type(network).__name__} cannot be traced for export: {first}. Its forward pass must take one tensor, "
            "return one and not branch on values"
        ) from error
    return _Reader(program, quantized_weights(network)).read()


def _trace_as_one_operation(operator: Operator, site: str) -> None:
    """Trace a feature operator as one custom operator."""
    decimal = int(operator.decimal) if isinstance(operator, Quantizer) else 0

    def call(_module: nn.Module, _args: Any, x: Tensor) -> Tensor:
        if isinstance(operator, Pruner):
            return torch.ops.qprune.mask(x, operator.mask, operator.border, site)  # type: ignore[no-any-return]
        return torch.ops.qprune.grid(x, operator.bits, decimal, operator.rounding, site)  # type: ignore[no-any-return]

    operator.active = False
    operator.register_forward_hook(call)


class _Reader:
    """Translates the graph of `torch.export` to nodes."""

    def __init__(self, program: torch.export.ExportedProgram, weights: dict[str, Weight]) -> None:
        signature, held = program.graph_signature, {**program.state_dict, **program.constants}
        self.names = {  # placeholder -> parameter or other constant
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self.constants = {name: held[target].detach() for name, target in self.names.items()}
        self.module, self.weights = program.graph_module, weights
        self.current: dict[fx.Node, str] = {}  # computed value -> the node that holds it

    def read(self) -> Trace:
        nodes: list[Node] = []
        for node in self.module.graph.nodes:
            if node.op == "placeholder" and node.name not in self.constants:
                nodes.append(Node(node.name, "input", shape=tuple(node.meta["val"].shape)))
                self.current[node] = node.name
            elif node.op == "call_function":
                nodes += self.operation(node)
            elif node.op == "output":
                outputs = node.args[0]
                if len(outputs) != 1 or outputs[0] not in self.current:
                    what = f"the network returns {len(outputs)} values"
                    raise UserError(f"{what}, and qprune export writes networks of one")
                return Trace(nodes, self.current[outputs[0]])
        raise AssertionError("a graph without an output")

    def operation(self, call: fx.Node) -> list[Node]:
        """Return the node of an operation; none for an identity in evaluation mode."""
        written = str(getattr(call.target, "overloadpacket", call.target)).rpartition(".")[2]
        name = written.removesuffix("_")
        if name in IDENTITIES:
            self.current[call] = self.current[call.args[0]]  # type: ignore[index]
            return []
        stack = [("", None), *call.meta.get("nn_module_stack", {}).values()]  # of (path, class)
        node = Node(call.name, name, path=str(stack[-1][0]).removeprefix("L['self']").removeprefix("."))
        if name not in (*OPERATIONS, "grid", "mask"):
            legal = ", ".join(sorted(OPERATIONS))
            raise UserError(f"the operation {name!r} in {node.where} cannot be exported; those that can are {legal}")
        node.shape, node.run = tuple(call.meta["val"].shape), partial(_run, call, name, self.constants)
        normalized = call.normalized_arguments(self.module, normalize_to_only_use_kwargs=True)
        assert normalized is not None
        for key, value in normalized.kwargs.items():
            read = [n for n in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(n, fx.Node)]
            if not read:
                node.arguments[key] = value
            elif read[0].name in self.constants:
                node.tensors[key] = self.constants[read[0].name]
            node.inputs += [self.current[n] for n in read if n in self.current]
        node.path = node.arguments.get("site", node.path)
        if name == "add" and (len(node.inputs) != 2 or node.arguments["alpha"] != 1):
            raise UserError(f"an addition of other than two computed tensors in {node.where} cannot be exported")
        if name in LAYERS:
            if "weight" not in node.tensors:
                raise UserError(f"a layer in {node.where} whose weight is computed cannot be exported")
            if name == "linear" and len(node.shape) != 2:
                what = f"the linear layer {node.path!r} returns {len(node.shape)} dimensions"
                raise UserError(f"{what}, and export writes it for 2")
            weight = self.names[call.args[1].name]  # type: ignore[union-attr]
            node.weight = self.weights.get(weight.removesuffix(".weight"))
        if written != name:  # in place: whatever reads the input later reads the result
            changed = self.current[call.args[0]]  # type: ignore[index]
            self.current = {key: node.name if held == changed else held for key, held in self.current.items()}
        self.current[call] = node.name
        return [node]


def _run(call: fx.Node, name: str, constants: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    """Run a traced operation out of place, for any batch size."""
    if name in ("flatten", "reshape", "view"):
        return inputs[0].reshape(len(inputs[0]), *call.meta["val"].shape[1:])
    given = iter(inputs)
    args, kwargs = map_arg(
        (call.args, call.kwargs), lambda n: constants[n.name] if n.name in constants else next(given)
    )
    result: Tensor = getattr(torch.ops.aten, name)(*args, **kwargs)
    return result
