"""Insert operators into a network and take them out again: parametrizations on weights, hooks on features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from qprune.compression.config import PruneConfig, QuantizeConfig
from qprune.compression.operator import Operator
from qprune.compression.plan import INPUT, INPUT_OF, Plan, Site, weight_place
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer
from qprune.errors import UserError

OUTPUT_CHILD, INPUT_CHILD = "output_operators", "input_operators"


class FeatureOperators(nn.Module):
    """The operators of one feature map: a pruner, then a quantizer (Section 3); either may be None.

    Where both act, they are one function and one pass: the quantizer multiplies by the mask.

    Args:
        pruner, quantizer: The operators.
        site: The path in the plan, which for an input does not follow from the module's place.
    """

    def __init__(self, pruner: Pruner | None, quantizer: Quantizer | None, site: str = "") -> None:
        super().__init__()
        self.site = site
        self.pruner, self.quantizer = pruner, quantizer
        self.handle: RemovableHandle  # of the hook that calls them

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, ...) after the operators that are active."""
        pruner, quantizer = self.pruner, self.quantizer
        mask = None
        if pruner is not None:
            if quantizer is not None and pruner.active and quantizer.active and not quantizer.collecting:
                mask = pruner.mask_for(x)
            else:
                x = pruner(x)
        if quantizer is not None:
            x = quantizer(x, mask)
        return x


@dataclass(frozen=True)
class Placed:
    """An operator in its place.

    Attributes:
        path: The site: the module that has the weight or makes the feature.
        operator: The operator.
        chain: For a weight, its parametrizations.
    """

    path: str
    operator: Operator
    chain: parametrize.ParametrizationList | None = None

    @property
    def kind(self) -> str:
        """`weight` or `feature`."""
        return "feature" if self.chain is None else "weight"

    @torch.no_grad()
    def weight_in(self) -> Tensor:
        """Return what reaches this operator of a weight: the raw weight after the operators before this one."""
        assert self.chain is not None
        value: Tensor = self.chain.original
        for operator in self.chain:
            if operator is self.operator:
                break
            value = operator(value)
        return value


def prepare(network: nn.Module, plan: Plan, prune: PruneConfig | None, quantize: QuantizeConfig | None) -> None:
    """Insert the plan's operators into `network`, in place.

    Module classes, names and code stay as they were. The operators of a feature become a child of the module that
    makes it (`output_operators`), which one forward hook calls. A pruner always stands before a quantizer (Section 3).

    Args:
        network: Any module.
        plan: Its sites.
        prune, quantize: What operators to build; None for none of the kind.

    Raises:
        UserError: Two sites are one tensor, or a weight cannot take an operator.
    """
    for site in plan.active:
        if site.kind == "weight":
            layer, name = weight_place(network, site.path)
            if site.prune and prune:
                prune.for_weights().on(layer, name)
            if site.quantize and quantize:
                quantize.for_weights(layer, name).on(layer, name)
        else:
            _prepare_feature(
                network,
                site,
                prune.for_features() if site.prune and prune else None,
                quantize.for_features() if site.quantize and quantize else None,
            )


def _prepare_feature(network: nn.Module, site: Site, pruner: Pruner | None, quantizer: Quantizer | None) -> None:
    module, at_input = _module_of(network, site)
    # A Sequential would run a new child as one of its layers; its first or last layer has the same tensor.
    while isinstance(module, nn.Sequential):
        module = module[0 if at_input else -1]
    for outer in network.modules():
        if isinstance(outer, nn.TransformerEncoder):  # in evaluation it may pack padded batches into nested tensors
            outer.use_nested_tensor = False
    child = INPUT_CHILD if at_input else OUTPUT_CHILD
    if hasattr(module, child):
        raise UserError(f"the site {site.path!r} is the same tensor as another site of the plan; name only one of them")
    operators = FeatureOperators(pruner, quantizer, site.path)
    module.add_module(child, operators)
    if at_input:
        operators.handle = module.register_forward_pre_hook(_operate_on_input)
    else:
        operators.handle = module.register_forward_hook(_operate_on_output)


def _module_of(network: nn.Module, site: Site) -> tuple[nn.Module, bool]:
    """Return the module at a feature's site, and whether the feature is its input."""
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
    return getattr(module, INPUT_CHILD)(args[0]), *args[1:]


def _operate_on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if not isinstance(output, Tensor):
        raise UserError(
            f"{type(module).__name__} returns {type(output).__name__}, not a tensor, and cannot be a site; name "
            "a module inside it, or the layer that reads the tensor, as 'path.of.layer.input'"
        )
    return getattr(module, OUTPUT_CHILD)(output)


def find_operators(network: nn.Module) -> Iterator[Placed]:
    """Yield all operators of a network in their places."""
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
    """Return the site of a weight from the name of its parametrizations, or of what is inside them."""
    layer, _, rest = f".{name}".rpartition(".parametrizations.")
    tensor = rest.split(".")[0]
    return (layer if tensor == "weight" else f"{layer}.{tensor}").removeprefix(".")


def _feature_path(network: nn.Module, path: str) -> str:
    parts = path.split(".")
    if INPUT_CHILD in parts:
        return str(network.get_submodule(".".join(parts[: parts.index(INPUT_CHILD) + 1])).site)
    return ".".join(parts[: parts.index(OUTPUT_CHILD)]) if OUTPUT_CHILD in parts else path


def run_example(network: nn.Module, example: Any) -> Any:
    """Pass `example` through `network` in evaluation mode, without gradients, and return the output.

    Every module's mode and the random state are restored.

    Args:
        network: Any module.
        example: A tensor, a tuple of positional arguments, or a dict of arguments by name.
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
