"""The computation of a compressed network as a flat list of nodes, with its grids and masks in their places."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import Node as FxNode

from qprune.compression.operator import Operator
from qprune.compression.prepare import FeatureOperators, find_operators, make_plain
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer
from qprune.errors import UserError
from qprune.export.weights import Weight, weights_of

# PyTorch's name of an operation -> ours. What is not here cannot be exported.
OPERATIONS = {
    "adaptive_avg_pool2d": "adaptive_avg_pool",
    "add": "add",
    "add_": "add",
    "avg_pool2d": "avg_pool",
    "batch_norm": "batch_norm",
    "cat": "concat",
    "conv2d": "conv",
    "conv_transpose2d": "conv_transpose",
    "flatten": "flatten",
    "grid": "grid",
    "hardtanh": "clip",
    "hardtanh_": "clip",
    "instance_norm": "instance_norm",
    "leaky_relu": "leaky_relu",
    "leaky_relu_": "leaky_relu",
    "linear": "linear",
    "mask": "mask",
    "max_pool2d": "max_pool",
    "mean": "mean",
    "pad": "pad",
    "pixel_shuffle": "pixel_shuffle",
    "relu": "relu",
    "relu6": "relu6",
    "relu_": "relu",
    "reshape": "reshape",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "view": "reshape",
}
PASSED_OVER = ("alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "identity")
LAYERS = ("conv", "conv_transpose", "linear")


@dataclass
class Node:
    """One operation: `op` is a value of OPERATIONS, inputs name nodes, arguments are PyTorch's by name.

    shape: of the output, at the example. path: the module that does it. weight: of a layer, as integers if it has a
    grid. tensors: the constant tensors among the arguments.
    """

    name: str
    op: str
    inputs: list[str]
    arguments: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    path: str = ""
    weight: Weight | None = None


@dataclass
class Chain:
    """What follows a layer, each read by the next alone: norm, mask and grid, as far as they are there."""

    norm: Node | None = None
    mask: Node | None = None
    grid: Node | None = None
    last: Node | None = None


@dataclass
class Trace:
    """Nodes in the order of computation. The first is the input, `output` names the last."""

    nodes: list[Node]
    output: str

    def users(self, name: str) -> list[Node]:
        """The nodes that read `name`."""
        return [node for node in self.nodes if name in node.inputs]

    def following(self, node: Node) -> Chain:
        """The norm, mask and grid behind a node."""
        chain, at = Chain(last=node), node
        while True:
            users = self.users(at.name)
            if len(users) != 1 or at.name == self.output:
                return chain
            user = users[0]
            if (
                user.op == "batch_norm"
                and not (chain.norm or chain.mask or chain.grid)
                and not user.arguments["training"]
            ):
                chain.norm = user
            elif user.op == "mask" and not (chain.mask or chain.grid):
                chain.mask = user
            elif user.op == "grid" and not chain.grid:
                chain.grid = user
            else:
                return chain
            chain.last = at = user


@torch.library.custom_op("qprune::grid", mutates_args=())
def _grid(x: Tensor, bits: int, decimal: int, rounding: str) -> Tensor:
    return x.clone()


@torch.library.custom_op("qprune::mask", mutates_args=())
def _mask(x: Tensor, mask: Tensor, border: str) -> Tensor:
    return x.clone()


_grid.register_fake(lambda x, bits, decimal, rounding: torch.empty_like(x))
_mask.register_fake(lambda x, mask, border: torch.empty_like(x))


class _Marks(nn.Module):
    """Stands where operators stood, so that the trace shows them as one node each."""

    at_rest = False  # as `FeatureOperators` is asked

    def __init__(self, operators: list[Operator]) -> None:
        super().__init__()
        self.operators = [operator for operator in operators if operator.active]
        for i, operator in enumerate(self.operators):
            if isinstance(operator, Pruner):
                self.register_buffer(f"mask{i}", operator.mask.clone())

    def forward(self, x: Tensor, sole_reader: bool = False) -> Tensor:
        for i, operator in enumerate(self.operators):
            if isinstance(operator, Pruner):
                x = torch.ops.qprune.mask(x, getattr(self, f"mask{i}"), operator.border)
            elif isinstance(operator, Quantizer):
                x = torch.ops.qprune.grid(x, operator.bits, int(operator.decimal), operator.rounding)
        return x


def trace(network: nn.Module, example: Tensor) -> Trace:
    """The nodes that `network` passes for `example` in evaluation mode; the network itself stays as it is.

    Raises UserError for an operation or a control flow that cannot be exported.
    """
    weights = weights_of(network)
    marked = _marked(network)
    try:
        program = torch.export.export(marked, (example,))
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{type(network).__name__} cannot be traced for export: {first}. Its forward pass must take one tensor, "
            "return one and not branch on values"
        ) from error
    return _read(program, weights)


def _marked(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode with plain weights, and marks for feature operators."""
    marked = copy.deepcopy(network).eval()
    for module in marked.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, FeatureOperators):
                setattr(module, name, _Marks([o for o in (child.pruner, child.quantizer) if o is not None]))
            elif isinstance(child, (Pruner, Quantizer)) and not isinstance(
                module, torch.nn.utils.parametrize.ParametrizationList
            ):
                setattr(module, name, _Marks([child]))
    for placed in list(find_operators(marked)):
        if placed.chain is not None:
            layer = marked.get_submodule(placed.path)
            if torch.nn.utils.parametrize.is_parametrized(layer, "weight"):
                make_plain(layer)
    return marked


def _read(program: torch.export.ExportedProgram, weights: dict[str, Weight]) -> Trace:
    signature = program.graph_signature
    held = {**program.state_dict, **program.constants}
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    constants = {node: held[target] for node, target in names.items()}
    same: dict[str, str] = {}  # nodes that do nothing -> their input
    nodes: list[Node] = []
    for fx in program.graph.nodes:
        if fx.op == "placeholder":
            if fx.name not in constants:
                if nodes:
                    raise UserError("the network takes more than one tensor, and qprune export writes networks of one")
                nodes.append(Node(fx.name, "input", [], shape=_shape(fx)))
        elif fx.op == "call_function":
            node = _node(fx, constants, same)
            if node is None:
                same[fx.name] = _resolve(fx.args[0].name, same)
                continue
            if node.op in LAYERS:
                node.weight = weights.get(names.get(fx.args[1].name, "").removesuffix(".weight"))
            nodes.append(node)
        elif fx.op == "output":
            outputs = fx.args[0]
            if len(outputs) != 1 or not isinstance(outputs[0], FxNode):
                raise UserError(f"the network returns {len(outputs)} values, and qprune export writes networks of one")
            return Trace(nodes, _resolve(outputs[0].name, same))
    raise AssertionError("a graph without an output")


def _node(fx: FxNode, constants: dict[str, Tensor], same: dict[str, str]) -> Node | None:
    """The node of an operation, or None if it does nothing in evaluation mode."""
    name = str(getattr(fx.target, "overloadpacket", fx.target)).rpartition(".")[2]
    path = _path(fx)
    if name in PASSED_OVER:
        return None
    if name not in OPERATIONS:
        raise UserError(
            f"the operation {name!r} in {path or 'the network'} cannot be exported; those that can are "
            f"{', '.join(sorted(set(OPERATIONS.values()) - {'grid', 'mask'}))}"
        )
    schema = fx.target._schema  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in schema.arguments), fx.args, strict=False)) | dict(fx.kwargs)
    values = {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema.arguments}
    node = Node(fx.name, OPERATIONS[name], [], shape=_shape(fx), path=path)
    for key, value in values.items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, FxNode):
                if item.name in constants:
                    node.tensors[key] = constants[item.name].detach()
                else:
                    node.inputs.append(_resolve(item.name, same))
        if not isinstance(value, FxNode) and not (
            isinstance(value, (list, tuple)) and any(isinstance(i, FxNode) for i in value)
        ):
            node.arguments[key] = value
    if node.op == "add" and (len(node.inputs) != 2 or node.arguments.get("alpha", 1) != 1):
        raise UserError(f"an addition of other than two computed tensors in {path or 'the network'} cannot be exported")
    return node


def _resolve(name: str, same: dict[str, str]) -> str:
    return same.get(name, name)


def _shape(fx: FxNode) -> tuple[int, ...]:
    return tuple(int(n) for n in fx.meta["val"].shape)


def _path(fx: FxNode) -> str:
    stack = fx.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(stack.values()), ("", ""))
    del kind
    return str(path).removeprefix("L['self'].").replace("L['self']", "")
