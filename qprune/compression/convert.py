"""Convert a prepared network to plain torch: weights as constants on their grids, features by generated functions.

The operators of a feature become a `torch.fx.GraphModule`, whose generated code calls torch alone. It is a forward
hook as the operators were, so module classes, names and code stay as they are, and no class of qprune is left: the
network is saved, loaded, exported, traced and compiled without it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from qprune.compression.operator import Operator
from qprune.compression.prepare import FACTS, INPUT_CHILD, OUTPUT_CHILD, FeatureOperators, facts_of, find_operators
from qprune.compression.pruner import Pruner, tile_mask
from qprune.compression.quantizer import Quantizer
from qprune.errors import UserError


def convert(network: nn.Module) -> nn.Module:
    """Return a copy of a prepared network with its present state built in, of plain torch modules.

    Its outputs equal those of the prepared network in evaluation mode, bit for bit. Parameters keep their names, their
    sharing and whether they require gradients.

    Args:
        network: A network with operators; it is not changed.

    Raises:
        UserError: The network cannot be copied.
    """
    converted = with_plain_weights(network)
    for module in list(converted.modules()):
        for name in (INPUT_CHILD, OUTPUT_CHILD):
            if isinstance(operators := getattr(module, name, None), FeatureOperators):
                _replace(module, name, operators)
    return converted


def with_plain_weights(network: nn.Module) -> nn.Module:
    """Return a copy with plain weights, on their grids, and with the operators of features as they are."""
    try:
        copied = copy.deepcopy(network)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise UserError(
            f"{type(network).__name__} cannot be copied, and convert works on a copy: {error}. Detach tensors that a "
            "forward pass leaves in attributes (self.last = x.detach()), and give classes that hold locks, files or "
            "streams a __deepcopy__"
        ) from error
    for placed in find_operators(copied):
        operator = placed.operator
        operator.settle()
        operator.active, operator.observing, operator.owner = operator.acts, False, ()
        operator.start_window()
    shared: dict[int, nn.Parameter] = {}
    for module in list(copied.modules()):
        if parametrize.is_parametrized(module):
            chains = module.parametrizations.values()  # type: ignore[operator]
            if any(isinstance(each, Operator) for chain in chains for each in chain):
                _make_plain(module, shared)
    return copied


class _Function(nn.Module):
    """What active operators compute, in a form that torch.fx traces: no branch depends on a tensor or its size.

    Masks and fraction bits are buffers of the names that they have in the operators. Each function takes x, or what is
    made of it: torch.fx computes those of buffers alone while it traces.
    """

    def __init__(self, pruner: Pruner | None, quantizer: Quantizer | None) -> None:
        super().__init__()
        self.prunes, self.quantizes = pruner is not None, quantizer is not None
        if pruner is not None:
            self.pruner = nn.Module()
            self.pruner.register_buffer("mask", pruner.mask.clone())
            self.tiled, self.border = pruner.granularity == "element" and pruner.mask.dim() > 1, pruner.border
        if quantizer is not None:
            self.quantizer = nn.Module()
            self.quantizer.register_buffer("decimal", quantizer.fraction_bits)  # whole numbers survive `.half()`
            self.bounds, self.rounding = quantizer.grid.bounds, _ROUNDINGS[quantizer.rounding]

    def forward(self, module: Any, args: Any, output: Tensor) -> Tensor:
        """Forward hook: return the output after the operators."""
        return self.operate(output)

    def operate(self, x: Tensor) -> Tensor:
        """Return x (B, ...), masked and on the grid, in x's type."""
        wide = x.float()
        if self.prunes:
            mask = self.pruner.get_buffer("mask")
            if self.tiled:
                size = tuple(x.shape[dim] for dim in range(2, mask.dim() + 1))
                mask = tile_mask(wide.new_ones(()) * mask, size, self.border)
            wide = wide * mask
        if self.quantizes:
            scale = torch.exp2(wide.new_ones(()) * self.quantizer.get_buffer("decimal"))
            wide = self.rounding((wide * scale).clamp(*self.bounds)) / scale
        return wide.type_as(x)


class _InputFunction(_Function):
    """The same for the first positional argument of a module."""

    def forward(self, module: Any, args: Any) -> Any:  # type: ignore[override]
        """Forward pre-hook: return the arguments, the first of them after the operators."""
        return (self.operate(args[0]),) + args[1:]  # noqa: RUF005  (torch.fx cannot trace an unpacked argument)


def _trunc(x: Tensor) -> Tensor:
    return x - x.frac()


_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {"floor": torch.floor, "nearest": torch.round, "trunc": _trunc}


def _replace(module: nn.Module, name: str, operators: FeatureOperators) -> None:
    """Put a generated function in the place of a feature's operators and of the hook that calls them."""
    operators.handle.remove()
    delattr(module, name)
    pruner = operators.pruner if operators.pruner is not None and operators.pruner.acts else None
    quantizer = operators.quantizer if operators.quantizer is not None and operators.quantizer.acts else None
    if pruner is None and quantizer is None:
        return
    _note(module, name, {"site": operators.site, **facts_of((pruner, quantizer))})
    if name == INPUT_CHILD:
        generated = fx.symbolic_trace(_InputFunction(pruner, quantizer))
        module.register_forward_pre_hook(generated)
    else:
        generated = fx.symbolic_trace(_Function(pruner, quantizer))
        module.register_forward_hook(generated)
    module.add_module(name, generated)


def _note(module: nn.Module, name: str, facts: dict[str, Any]) -> None:
    """Leave facts about operators on a module, for sizes and costs: an attribute that copies and files keep."""
    setattr(module, FACTS, {**getattr(module, FACTS, {}), name: facts})


def _make_plain(layer: nn.Module, shared: dict[int, nn.Parameter]) -> None:
    """Replace the parametrized weights of a copied layer by their present values.

    `remove_parametrizations` deletes the property from the layer's class, which a deep copy shares with its original
    (https://github.com/pytorch/pytorch/pull/80811), so that the original would lose its weight too.
    """
    weights: dict[str, nn.Parameter] = {}
    order: tuple[str, ...] = ()
    for name, chain in layer.parametrizations.items():  # type: ignore[operator, union-attr]
        original = chain.original
        value = getattr(layer, name).detach().to(original.dtype, copy=True)
        same = shared.setdefault(id(original), nn.Parameter(value, requires_grad=original.requires_grad))
        weights[name] = same if torch.equal(same, value) else nn.Parameter(value, requires_grad=original.requires_grad)
        order = max(order, *(each.order for each in chain if isinstance(each, Operator)), key=len)
        _note(layer, name, facts_of(chain))
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    others = dict(layer.named_parameters(recurse=False))
    for name in others:
        delattr(layer, name)
    found = weights | others
    for name in dict.fromkeys((*order, *found)):
        layer.register_parameter(name, found[name])
