"""Putting operators into a network without touching its code: parametrizations on weights, a hook on features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qprune.compression.feature import FeatureOperators
from qprune.compression.operator import Operator
from qprune.compression.options import Pruning, Quantization
from qprune.compression.plan import INPUT, Plan, Site
from qprune.errors import UserError

OUTPUT_CHILD, INPUT_CHILD = "output_operators", "input_operators"


@dataclass(frozen=True)
class Placed:
    """An operator where it stands: `path` names the tensor's module; `chain`, for a weight, its parametrizations."""

    path: str
    operator: Operator
    chain: parametrize.ParametrizationList | None = None

    @property
    def kind(self) -> str:
        """`weight` or `feature`."""
        return "feature" if self.chain is None else "weight"

    @torch.no_grad()
    def weight_in(self) -> Tensor:
        """What reaches this operator of a weight: the raw weight after the operators before this one."""
        assert self.chain is not None
        value: Tensor = self.chain.original
        for operator in self.chain:
            if operator is self.operator:
                break
            value = operator(value)
        return value


def place(network: nn.Module, plan: Plan, pruning: Pruning | None, quantization: Quantization | None) -> None:
    """Put the plan's operators into `network`, in place. Structurally a pruner stands before a quantizer (section 3).

    Module classes, names and code stay as they were; the operators of a feature become a child of the module that
    makes it (`output_operators`), and one forward hook calls them. Raises UserError where two sites are one tensor.
    """
    for site in plan.active:
        if site.kind == "weight":
            layer = network.get_submodule(site.path)
            if site.prune and pruning:
                pruning.for_weights().on(layer)
            if site.quantize and quantization:
                quantization.for_weights(layer).on(layer)
        else:
            _place_on_feature(network, site, pruning, quantization)


def _place_on_feature(
    network: nn.Module, site: Site, pruning: Pruning | None, quantization: Quantization | None
) -> None:
    operators = FeatureOperators(
        pruning.for_features() if site.prune and pruning else None,
        quantization.for_features() if site.quantize and quantization else None,
    )
    at_input = site.path == INPUT
    module = network if at_input else network.get_submodule(site.path)
    # A Sequential would run a new child as one of its layers: its first or last layer is the same tensor's other end.
    while isinstance(module, nn.Sequential):
        module = module[0 if at_input else -1]
    child = INPUT_CHILD if at_input else OUTPUT_CHILD
    if hasattr(module, child):
        raise UserError(f"the site {site.path!r} is the same tensor as another site of the plan; name only one of them")
    module.add_module(child, operators)
    if at_input:
        module.register_forward_pre_hook(_operate_on_input)
    else:
        module.register_forward_hook(_operate_on_output)


# Plain functions of the module they are called with, so that a deep copy calls its own operators.
def _operate_on_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (getattr(module, INPUT_CHILD)(args[0]), *args[1:])


def _operate_on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if not isinstance(output, Tensor):
        raise UserError(f"{type(module).__name__} returns {type(output).__name__}, not a tensor, and cannot be a site")
    return getattr(module, OUTPUT_CHILD)(output)


def find_operators(network: nn.Module) -> Iterator[Placed]:
    """All operators in a network with the path of the tensor they work on."""
    chains = {
        operator: (path, chain)
        for path, chain in network.named_modules()
        if isinstance(chain, parametrize.ParametrizationList)
        for operator in chain
    }
    for path, module in network.named_modules():
        if not isinstance(module, Operator):
            continue
        if module in chains:
            chain_path, chain = chains[module]
            yield Placed(chain_path.rpartition(".parametrizations.")[0], module, chain)
        else:
            yield Placed(_feature_path(path), module)


def _feature_path(path: str) -> str:
    parts = path.split(".")
    if INPUT_CHILD in parts:
        return INPUT
    return ".".join(parts[: parts.index(OUTPUT_CHILD)]) if OUTPUT_CHILD in parts else path


def make_plain(layer: nn.Module) -> None:
    """Replace the parametrized weight of `layer` by its present value, a plain parameter.

    torch's `remove_parametrizations` would take the weight away from every copy of the layer as well: a deep copy of
    a parametrized module shares the class that carries the property.
    """
    weight = layer.weight.detach().clone()  # type: ignore[operator]
    del layer._modules["parametrizations"]
    layer.__class__ = type(layer).__bases__[0]
    others = dict(layer._parameters)
    layer._parameters.clear()
    layer.register_parameter("weight", nn.Parameter(weight))  # first, where convolutions and linear layers have it
    layer._parameters.update(others)


def run_example(network: nn.Module, example: Any) -> Any:
    """One forward pass of `example` (a tensor, or a tuple of arguments) in evaluation mode, without gradients.

    Every module's own mode is restored, random state included, so that nothing is left behind.
    """
    modes = {module: module.training for module in network.modules()}
    state = torch.get_rng_state()
    network.eval()
    try:
        with torch.no_grad(), parametrize.cached():
            return network(*example) if isinstance(example, tuple) else network(example)
    finally:
        torch.set_rng_state(state)
        for module, mode in modes.items():
            module.training = mode
