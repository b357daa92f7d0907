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
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from qprune.compression.operator import Operator
from qprune.compression.prepare import INPUT_CHILD, OUTPUT_CHILD, FeatureOperators, find_operators
from qprune.compression.pruner import Pruner


def convert(network: nn.Module) -> nn.Module:
    """Return a copy of a prepared network with its present state built in, of plain torch modules.

    Its outputs equal those of the prepared network in evaluation mode, bit for bit. Parameters keep their names, their
    sharing and whether they require gradients.

    Args:
        network: A network with operators; it is not changed.
    """
    converted = with_plain_weights(network)
    for module in list(converted.modules()):
        for name in (INPUT_CHILD, OUTPUT_CHILD):
            if isinstance(operators := getattr(module, name, None), FeatureOperators):
                _replace(module, name, operators)
    return converted


def with_plain_weights(network: nn.Module) -> nn.Module:
    """Return a copy with plain weights, on their grids, and with the operators of features as they are."""
    copied = copy.deepcopy(network)
    for placed in find_operators(copied):
        operator = placed.operator
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
    """What active operators compute, in a form that torch.fx traces: no branch depends on a tensor or its size."""

    mask: Tensor

    def __init__(self, operators: FeatureOperators) -> None:
        super().__init__()
        pruner, quantizer = operators.pruner, operators.quantizer
        self.pruner = (pruner,) if pruner is not None and pruner.acts else ()
        self.quantizer = (quantizer,) if quantizer is not None and quantizer.acts else ()
        if self.pruner:
            self.register_buffer("mask", self.pruner[0].mask.clone())

    def forward(self, module: Any, args: Any, output: Tensor) -> Tensor:
        """Forward hook: return the output after the operators."""
        return self.operate(output)

    def operate(self, x: Tensor) -> Tensor:
        """Return x (B, ...), masked and on the grid, in x's type."""
        wide = x.float()
        for pruner in self.pruner:
            wide = wide * self.fitted(x, pruner).float()
        for quantizer in self.quantizer:
            low, high = quantizer.grid.bounds
            scale = 2.0 ** int(quantizer.decimal)
            clamped = (wide * scale).clamp(low, high)
            rounding: Callable[[Tensor], Tensor] = _ROUNDINGS[quantizer.rounding]
            wide = rounding(clamped) * (1 / scale)
        return wide.type_as(x)

    def fitted(self, x: Tensor, pruner: Pruner) -> Tensor:
        """Return the mask tiled over x's size, as `pruner.tile_mask`, by functions that take symbolic sizes."""
        mask, dims = self.mask, pruner.mask.dim()
        if pruner.granularity != "element" or dims < 2:
            return mask
        for dim in range(1, dims):
            tile, length = pruner.mask.shape[dim], x.shape[dim + 1]
            tiles: list[Any] = [1] * dims
            if pruner.border == "keep":
                tiles[dim] = length // tile
                before = (length - length // tile * tile) // 2
                padding = [0] * (2 * (dims - 1 - dim))
                rest = length - length // tile * tile - before
                mask = F.pad(mask.repeat(tiles), [*padding, before, rest], value=1.0)
            else:
                whole = length // tile
                # At least one tile, as whole + 1 // (whole + 1) counts it: traced sizes have no maximum.
                offset = (length - (whole + 1 // (whole + 1)) * tile) // 2
                tiles[dim] = whole + 2
                mask = mask.repeat(tiles).narrow(dim, (0 - offset) % tile, length)
        return mask


class _InputFunction(_Function):
    """The same for the first positional argument of a module."""

    def forward(self, module: Any, args: Any) -> Any:  # type: ignore[override]
        """Forward pre-hook: return the arguments, the first of them after the operators."""
        return (self.operate(args[0]),) + args[1:]  # noqa: RUF005  (torch.fx cannot trace an unpacked argument)


def _trunc(x: Tensor) -> Tensor:
    return x - x.frac()


_ROUNDINGS: dict[str, Any] = {"floor": torch.floor, "nearest": torch.round, "trunc": _trunc}


def _replace(module: nn.Module, name: str, operators: FeatureOperators) -> None:
    """Put a generated function in the place of a feature's operators and of the hook that calls them."""
    operators.handle.remove()
    delattr(module, name)
    at_input = name == INPUT_CHILD
    function = (_InputFunction if at_input else _Function)(operators)
    if function.pruner or function.quantizer:
        generated = fx.symbolic_trace(function)
        module.add_module(name, generated)
        (module.register_forward_pre_hook if at_input else module.register_forward_hook)(generated)


def _make_plain(layer: nn.Module, shared: dict[int, nn.Parameter]) -> None:
    """Replace the parametrized weights of a copied layer by their present values.

    `remove_parametrizations` deletes the property from the layer's class, which a deep copy shares with its original
    (https://github.com/pytorch/pytorch/pull/80811), so that the original would lose its weight too.
    """
    weights = {}
    for name, chain in layer.parametrizations.items():  # type: ignore[operator, union-attr]
        value, original = getattr(layer, name).detach().clone(), chain.original
        same = shared.setdefault(id(original), nn.Parameter(value, requires_grad=original.requires_grad))
        weights[name] = same if torch.equal(same, value) else nn.Parameter(value, requires_grad=original.requires_grad)
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    others = dict(layer.named_parameters(recurse=False))
    for name in others:
        delattr(layer, name)
    for name, parameter in {**weights, **others}.items():  # weights first, as torch's layers have them
        layer.register_parameter(name, parameter)
