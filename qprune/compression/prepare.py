"""Putting operators into a network without touching its code: parametrizations on weights, a hook on features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qprune.compression.config import Pruning, Quantization
from qprune.compression.feature import FeatureOperators
from qprune.compression.operator import Operator
from qprune.compression.pair import called
from qprune.compression.plan import INPUT, INPUT_OF, Plan, Site, weight_place
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
            layer, name = weight_place(network, site.path)
            if site.prune and pruning:
                pruning.for_weights().on(layer, name)
            if site.quantize and quantization:
                quantization.for_weights(layer, name).on(layer, name)
        else:
            _place_on_feature(network, site, pruning, quantization)


def _place_on_feature(
    network: nn.Module, site: Site, pruning: Pruning | None, quantization: Quantization | None
) -> None:
    module, at_input = _module_of(network, site)
    # A Sequential would run a new child as one of its layers: its first or last layer is the same tensor's other end.
    while isinstance(module, nn.Sequential):
        module = module[0 if at_input else -1]
    for outer in network.modules():
        if isinstance(outer, nn.TransformerEncoder):  # in evaluation it may pack padded batches into nested tensors
            outer.use_nested_tensor = False
    operators = FeatureOperators(
        pruning.for_features() if site.prune and pruning else None,
        quantization.for_features() if site.quantize and quantization else None,
        site.path,
        fresh=not at_input and parametrize.type_before_parametrizations(module) in _MAKERS,
        of_tanh=not at_input and type(module) is nn.Tanh,
    )
    child = INPUT_CHILD if at_input else OUTPUT_CHILD
    if hasattr(module, child):
        raise UserError(f"the site {site.path!r} is the same tensor as another site of the plan; name only one of them")
    module.add_module(child, operators)
    if at_input:
        module.register_forward_pre_hook(_operate_on_input)
    else:
        module.register_forward_hook(_operate_on_output)


def _module_of(network: nn.Module, site: Site) -> tuple[nn.Module, bool]:
    """The module at a feature's site, and whether it is what the module is given."""
    if site.path == INPUT:
        return network, True
    try:
        return network.get_submodule(site.path), False
    except AttributeError:
        if not site.path.endswith(INPUT_OF.format("")):
            raise
        return network.get_submodule(site.path.removesuffix(INPUT_OF.format(""))), True


# Plain functions of the module they are called with, so that a deep copy calls its own operators.
def _operate_on_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        given = f"{args[0].dtype}" if args and isinstance(args[0], Tensor) else type(args[0] if args else None).__name__
        raise UserError(
            f"{type(module).__name__} is given {given} as its first positional argument, not a tensor of floating "
            f"point numbers: its input cannot be a site; leave {getattr(module, INPUT_CHILD).site!r} out of the plan"
        )
    operators: FeatureOperators = module._modules[INPUT_CHILD]  # type: ignore[assignment]  # past Module.__getattr__
    return args if operators.at_rest else (called(operators, args[0]), *args[1:])


def _operate_on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if not isinstance(output, Tensor):
        raise UserError(
            f"{type(module).__name__} returns {type(output).__name__}, not a tensor, and cannot be a site; name "
            "a module inside it, or the layer that reads the tensor, as 'path.of.layer.input'"
        )
    operators = _of_output(module)
    return output if operators.at_rest else called(operators, output, _is_sole_reader(module, output))


def _of_output(module: nn.Module) -> FeatureOperators:
    return module._modules[OUTPUT_CHILD]  # type: ignore[return-value]  # past Module.__getattr__


# Layers that make a new tensor which their own gradient does not need.
_MAKERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
)


def _is_sole_reader(module: nn.Module, output: Tensor) -> bool:
    """Whether the operators of `module` are the only ones who have got its output, a new tensor."""
    operators = _of_output(module)
    return (
        not torch.compiler.is_compiling()  # a compiler decides itself what is worked in and taken along
        and (operators.fresh or operators.of_tanh)
        and len(module._forward_hooks) == 1  # ours: another one may have kept the output
        and not nn.modules.module._global_forward_hooks
        and not output._is_view()
    )


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
            yield Placed(weight_path(chain_path), module, chain)
        else:
            yield Placed(_feature_path(network, path), module)


def weight_path(name: str) -> str:
    """The site of a weight from the name of its parametrizations, or of what is inside them."""
    layer, _, rest = f".{name}".rpartition(".parametrizations.")
    tensor = rest.split(".")[0]
    return (layer if tensor == "weight" else f"{layer}.{tensor}").removeprefix(".")


def _feature_path(network: nn.Module, path: str) -> str:
    parts = path.split(".")
    if INPUT_CHILD in parts:
        return str(network.get_submodule(".".join(parts[: parts.index(INPUT_CHILD) + 1])).site)
    return ".".join(parts[: parts.index(OUTPUT_CHILD)]) if OUTPUT_CHILD in parts else path


def parametrizations_of(module: nn.Module) -> list[nn.Module]:
    """What stands around the parameters of `module` itself."""
    chains = module.parametrizations.values() if parametrize.is_parametrized(module) else ()  # type: ignore[operator]
    return [inner for chain in chains for inner in chain]


def make_plain(layer: nn.Module) -> None:
    """Replace the parametrized weights of `layer` by their present values, plain parameters.

    torch's `remove_parametrizations` would take the weight away from every copy of the layer as well: a deep copy of
    a parametrized module shares the class that carries the property.
    """
    weights = {name: getattr(layer, name).detach().clone() for name in layer.parametrizations}  # type: ignore[union-attr]
    del layer._modules["parametrizations"]
    layer.__class__ = type(layer).__bases__[0]
    others = dict(layer._parameters)
    layer._parameters.clear()
    for name, weight in weights.items():  # first, where convolutions, linear layers and attention have them
        layer.register_parameter(name, nn.Parameter(weight))
    layer._parameters.update(others)


def run_example(network: nn.Module, example: Any) -> Any:
    """One forward pass of `example` in evaluation mode, without gradients.

    example: a tensor, a tuple of positional arguments, or a dict of arguments by name.

    Every module's own mode is restored, random state included, so that nothing is left behind.
    """
    modes = {module: module.training for module in network.modules()}
    state = torch.get_rng_state()
    network.eval()
    try:
        with torch.no_grad(), parametrize.cached():
            if isinstance(example, dict):
                return network(**example)
            return network(*example) if isinstance(example, tuple) else network(example)
    finally:
        torch.set_rng_state(state)
        for module, mode in modes.items():
            module.training = mode
