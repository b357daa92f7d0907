"""Insert operators into a network and take them out again: parametrizations on weights, hooks on features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from qprune.compression.config import PruneConfig, QuantizeConfig
from qprune.compression.operator import Operator
from qprune.compression.plan import INPUT, Plan, Site, weight_place
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer
from qprune.errors import UserError, closest

OUTPUT_CHILD, INPUT_CHILD = "output_operators", "input_operators"
# The attribute of a converted module with the facts of the operators that it had, by name of a weight or a child.
FACTS = "qprune_operators"


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

    @property
    def name(self) -> str:
        """Kind, path and class, as a compressor's state names it."""
        return f"{self.kind} {self.path} {type(self.operator).__name__}"

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
    modules = dict(network.named_modules())
    with all_or_nothing(network):
        for site in plan.active:
            pruned, quantized = prune if site.prune else None, quantize if site.quantize else None
            try:
                if site.kind == "weight":
                    layer, name = weight_place(network, site.path)
                    if pruned:
                        pruned.for_weights().on(layer, name)
                    if quantized:
                        quantized.for_weights(layer, name).on(layer, name)
                else:
                    pruner = pruned.for_features() if pruned else None
                    _prepare_feature(modules, site, pruner, quantized.for_features() if quantized else None)
            except UserError as error:
                raise UserError(f"{site.path or 'the network'}: {error}") from error
        if any(site.kind == "feature" for site in plan.active):
            for module in modules.values():
                if isinstance(module, nn.TransformerEncoder):  # in evaluation it may pack padded batches
                    module.use_nested_tensor = False


@contextmanager
def all_or_nothing(network: nn.Module) -> Iterator[None]:
    """Take the operators that were inserted inside out again if an error is raised."""
    before = {module: [name for name, _ in module.named_parameters(recurse=False)] for module in network.modules()}
    nested = [m for m in before if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]
    unsized = [m for m in before if isinstance(m, Pruner) and not m.mask.numel()]
    try:
        yield
    except BaseException:
        for module in list(network.modules()):
            _take_out(module, before)
        for encoder in nested:
            encoder.use_nested_tensor = True
        for pruner in unsized:
            pruner.mask = pruner.mask.new_empty(0)
        raise


def _take_out(module: nn.Module, before: dict[nn.Module, list[str]]) -> None:
    """Take the operators of a module that were not there before, with these names of parameters, out of it."""
    for child in (INPUT_CHILD, OUTPUT_CHILD):
        operators = getattr(module, child, None)
        if isinstance(operators, FeatureOperators) and operators not in before:
            operators.handle.remove()
            delattr(module, child)
    names = list(module.parametrizations) if parametrize.is_parametrized(module) else []  # type: ignore[arg-type]
    for name in names:
        chain = module.parametrizations[name]  # type: ignore[index]
        new = [i for i, operator in enumerate(chain) if operator not in before]
        if len(new) < len(chain):
            for i in reversed(new):
                del chain[i]  # type: ignore[union-attr]
        elif new:
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    if names:
        plain = dict(module.named_parameters(recurse=False))
        for name in before[module]:  # in this order, which is that of the state and of optimizers
            if name in plain:
                delattr(module, name)
                module.register_parameter(name, plain[name])


def _prepare_feature(
    modules: dict[str, nn.Module], site: Site, pruner: Pruner | None, quantizer: Quantizer | None
) -> None:
    module, at_input = _module_of(modules, site)
    # A Sequential would run a new child as one of its layers; its first or last layer has the same tensor.
    while isinstance(module, nn.Sequential):
        module = module[0 if at_input else -1]
    child = INPUT_CHILD if at_input else OUTPUT_CHILD
    if hasattr(module, child):
        raise UserError("this is the same tensor as that of another site of the plan; name only one of them")
    operators = FeatureOperators(pruner, quantizer, site.path)
    module.add_module(child, operators)
    if at_input:
        operators.handle = module.register_forward_pre_hook(_operate_on_input)
    else:
        operators.handle = module.register_forward_hook(_operate_on_output)


def _module_of(modules: dict[str, nn.Module], site: Site) -> tuple[nn.Module, bool]:
    """Return the module at a feature's site, and whether the feature is its input."""
    if site.path in modules:
        return modules[site.path], False
    path = site.path.removesuffix(INPUT).rstrip(".")
    if not site.path.endswith(INPUT) or path not in modules:
        raise UserError(f"there is no such module{closest(site.path, modules)}")
    return modules[path], True


# Plain functions of the module they are called with, so that a deep copy calls its own operators.
def _operate_on_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    operators = getattr(module, INPUT_CHILD)
    if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        given = f"{args[0].dtype}" if args and isinstance(args[0], Tensor) else type(args[0] if args else None).__name__
        raise UserError(
            f"{operators.site}: {type(module).__name__} is given {given} as its first positional argument, not a "
            "tensor of floating point numbers: its input cannot be a site; leave it out of the plan"
        )
    return operators(args[0]), *args[1:]


def _operate_on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    operators = getattr(module, OUTPUT_CHILD)
    if not isinstance(output, Tensor):
        raise UserError(
            f"{operators.site}: {type(module).__name__} returns {type(output).__name__}, not a tensor, and cannot be a "
            "site; name a module inside it, or the layer that reads the tensor, as 'path.of.layer.input'"
        )
    return operators(output)


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


def facts_of(operators: Iterable[nn.Module | None]) -> dict[str, Any]:
    """Return what sizes and costs depend on, of the operators of one tensor that act."""
    acting = [each for each in operators if isinstance(each, Operator) and each.acts]
    return {name: fact for each in acting for name, fact in each.facts.items()}


def split_name(name: str) -> tuple[str, str]:
    """Split the name of a parameter, or of its parametrizations or what is inside them, into module and tensor."""
    module, parametrized, rest = f".{name}".rpartition(".parametrizations.")
    if not parametrized:
        module, _, rest = rest.rpartition(".")
    return module.removeprefix("."), rest.split(".")[0]


def weight_path(name: str) -> str:
    """Return the site of a parameter from any name that `split_name` takes."""
    module, tensor = split_name(name)
    return module if tensor == "weight" else f"{module}.{tensor}".removeprefix(".")


def _feature_path(network: nn.Module, path: str) -> str:
    parts = path.split(".")
    if INPUT_CHILD in parts:
        return str(network.get_submodule(".".join(parts[: parts.index(INPUT_CHILD) + 1])).site)
    return ".".join(parts[: parts.index(OUTPUT_CHILD)]) if OUTPUT_CHILD in parts else path


def run_example(network: nn.Module, example: Any) -> Any:
    """Pass `example` through `network` in evaluation mode, without gradients, and return the output.

    Every module's mode and the random state are restored. What is compiled runs in eager mode.

    Args:
        network: Any module.
        example: A tensor, a tuple of positional arguments, or a dict of arguments by name.

    Raises:
        UserError: The example holds no samples.
    """
    if samples_in(example) == 0:
        raise UserError("the example holds no samples; give one batch as training does")
    modes = {module: module.training for module in network.modules()}
    devices = {p.device.index for p in network.parameters() if p.is_cuda}
    network.eval()
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            torch.random.fork_rng(devices),
            torch.no_grad(),
            parametrize.cached(),
        ):
            if isinstance(example, dict):
                return network(**example)
            return network(*example) if isinstance(example, tuple) else network(example)
    finally:
        for module, mode in modes.items():
            module.training = mode


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts, in order."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def samples_in(example: Any, results: Any = None) -> int | None:
    """Return the number of samples in an example: the first dimension that most arguments share, or None.

    Args:
        example: As in `run_example`. A list of tensors has one for each sample; numbers (0-d tensors) do not count.
        results: What the network returned, which counts where the arguments alone do not decide.
    """
    votes = Counter(_lengths(example))
    for vote in (votes, votes + Counter(_lengths(results))):
        ranked = vote.most_common(2)
        if len(ranked) == 1 or (len(ranked) == 2 and ranked[0][1] > ranked[1][1]):
            return ranked[0][0]
    return None


def _lengths(values: Any) -> Iterator[int]:
    for value in values if isinstance(values, tuple) else (values,):
        if isinstance(value, Tensor):
            yield from value.shape[:1]
        elif isinstance(value, Mapping):
            yield from _lengths(tuple(value.values()))
        elif isinstance(value, list | tuple):
            items = all(isinstance(each, Tensor | Mapping) for each in value)
            yield from [len(value)] if items else _lengths(tuple(value))
