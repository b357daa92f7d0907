"""Size in bits of all weights and features, site by site, in two accountings; and performance density.

`paper`: what the paper's numbers rest on (spec 5.1, 5.3). Features are the outputs of the modules that own parameters,
each counted twice (the counting tool's "for gradients"); bits and sparsity are charged as asked for, biases and norms
included. `actual`: each stored tensor once, with the bits and the zeros it really has; `actual with masks`: and a bit
for each entry of the masks, which say where those zeros are. Mb is 10^6 bits everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from qprune.compression.activation_trace import FLOAT_BITS, stored_features
from qprune.compression.config import PruneConfig, QuantizeConfig
from qprune.compression.operator import Operator
from qprune.compression.plan import INPUT, match
from qprune.compression.prepare import (
    FACTS,
    INPUT_CHILD,
    OUTPUT_CHILD,
    facts_of,
    find_operators,
    run_example,
    split_name,
    tensors_in,
)


@dataclass(frozen=True)
class Entry:
    """One tensor (or module, in `paper`): elements as counted, bits per element, fraction of elements kept."""

    name: str
    kind: str
    elements: int
    bits: float = FLOAT_BITS
    density: float = 1.0

    @property
    def size_bits(self) -> float:
        """Size in bits: elements * bits * density."""
        return self.elements * self.bits * self.density


@dataclass(frozen=True)
class Footprint:
    """The entries of one accounting, of the kinds `weight`, `feature`, `input` and, on request, `mask`."""

    accounting: str
    entries: tuple[Entry, ...]

    def size_bits(self, *kinds: str) -> float:
        """Return the bits of the entries of these kinds, or of all."""
        return sum(entry.size_bits for entry in self.entries if not kinds or entry.kind in kinds)

    def elements(self, *kinds: str) -> int:
        """Return the elements of the entries of these kinds, or of all."""
        return sum(entry.elements for entry in self.entries if not kinds or entry.kind in kinds)


@dataclass(frozen=True)
class PaperSize:
    """What the paper's sizes charge for a task (spec 5.3): globs over modules that own parameters, and the input.

    Args:
        count_input: Whether the network's input is charged.
        pruned_weights, pruned_features: What is charged as pruned.
        left_float: Modules whose weights and features are charged as floats in any recipe.
        feature_bits: Bits charged for a quantized feature where the paper charges others than the network has, or
            None.
    """

    count_input: bool = False
    pruned_weights: Sequence[str] = ("**",)
    pruned_features: Sequence[str] = ("**",)
    left_float: Sequence[str] = ()
    feature_bits: int | None = None


def paper_footprint(
    network: nn.Module,
    example: Any,
    size: PaperSize | None = None,
    prune: PruneConfig | None = None,
    quantize: QuantizeConfig | None = None,
) -> Footprint:
    """Account for a network as the paper does.

    Args:
        network: Any module.
        example: One sample.
        size: What the paper charges for the task.
        prune, quantize: What is charged; None for an operator that is not used.

    Returns:
        The footprint, in the accounting `paper`.
    """
    size = size or PaperSize()
    owners = dict(_parameter_owners(network))
    outputs = _output_elements(network, example, owners)
    feature_paths = [INPUT, *owners]
    left_float = match(size.left_float, list(owners), "paper_size.left_float")
    pruned = {
        "w": match(size.pruned_weights, list(owners), "paper_size.pruned_weights"),
        "f": match(size.pruned_features, feature_paths, "paper_size.pruned_features"),
    }
    bits = {
        "w": quantize.bits if quantize and "w" in quantize.targets else FLOAT_BITS,
        "f": FLOAT_BITS,
    }
    if quantize and "f" in quantize.targets:
        bits["f"] = quantize.bits_of_features if size.feature_bits is None else size.feature_bits

    def entry(name: str, kind: str, target: str, elements: int) -> Entry:
        kept = 1.0 - prune.sparsity if prune and target in prune.targets and name in pruned[target] else 1.0
        return Entry(name, kind, elements, FLOAT_BITS if name in left_float else bits[target], kept)

    entries = [
        entry(path, "weight", "w", sum(parameter.numel() for parameter in module.parameters()))
        for path, module in owners.items()
    ]
    if size.count_input:
        first = example[0] if isinstance(example, tuple) else example
        entries.append(entry(INPUT, "input", "f", first.numel()))
    entries += [entry(path, "feature", "f", 2 * outputs[path]) for path in owners]
    return Footprint("paper", tuple(entries))


class PlacedWeight(NamedTuple):
    """A parameter by its plain name, in its module, and the facts of the operators that act on it."""

    name: str
    module: nn.Module
    tensor: str
    parameter: nn.Parameter
    facts: dict[str, Any]


def weights_of(network: nn.Module) -> Iterator[PlacedWeight]:
    """Yield the parameters of a network, prepared or converted."""
    for name, parameter in network.named_parameters():
        path, tensor = split_name(name)
        module = network.get_submodule(path)
        facts = getattr(module, FACTS, {}).get(tensor, {})
        if parametrize.is_parametrized(module, tensor):
            facts = facts_of(module.parametrizations[tensor])  # type: ignore[index]
        plain = f".{name}".replace(".parametrizations.", ".").removesuffix(".original").removeprefix(".")
        yield PlacedWeight(plain, module, tensor, parameter, facts)


def actual_footprint(network: nn.Module, example: Any, count_masks: bool = False) -> Footprint:
    """Account for what a network stores in its present state; a converted one as the one that it was made of.

    Weights are all parameters, batch norm's included (they stand for the folded scale and shift); features are those
    of `stored_features`.

    Args:
        network: Any module.
        example: One sample.
        count_masks: Whether to add one bit per entry of every active mask, for hardware that stores them: the
            accounting `actual with masks`.

    Returns:
        The footprint, in the accounting `actual`.
    """
    entries, masks = [], []
    for weight in weights_of(network):
        bits, density = weight.facts.get("bits", FLOAT_BITS), weight.facts.get("density", 1.0)
        entries.append(Entry(weight.name, "weight", weight.parameter.numel(), bits, density))
        if "mask" in weight.facts:
            masks.append(Entry(weight.name, "mask", weight.facts["mask"], bits=1))
    for i, stored in enumerate(stored_features(network, example)):
        kind = "input" if i == 0 and stored.name == INPUT else "feature"
        entries.append(Entry(stored.name, kind, stored.elements, stored.bits, stored.density))
    noted = [facts for module in network.modules() for facts in getattr(module, FACTS, {}).values() if "site" in facts]
    placed = [{"site": p.path, **facts_of([p.operator])} for p in find_operators(network) if p.kind == "feature"]
    masks += [Entry(facts["site"], "mask", facts["mask"], bits=1) for facts in placed + noted if "mask" in facts]
    if count_masks:
        return Footprint("actual with masks", (*entries, *masks))
    return Footprint("actual", tuple(entries))


def _parameter_owners(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return modules with parameters of their own and no children but operators, in module order."""
    owners = []
    for path, module in network.named_modules():
        own = any(True for _ in module.parameters(recurse=False)) or parametrize.is_parametrized(module)
        children = [
            child
            for name, child in module.named_children()
            if name not in ("parametrizations", INPUT_CHILD, OUTPUT_CHILD) and not isinstance(child, Operator)
        ]
        if own and not children and not isinstance(module, parametrize.ParametrizationList):
            owners.append((path, module))
    return owners


def _output_elements(network: nn.Module, example: Any, owners: dict[str, nn.Module]) -> dict[str, int]:
    """Return the output elements of each module over all its calls while the example passes."""
    elements = dict.fromkeys(owners, 0)
    paths = {module: path for path, module in owners.items()}

    def count(module: nn.Module, args: Any, output: Any) -> None:
        elements[paths[module]] += sum(tensor.numel() for tensor in tensors_in(output))

    handles = [module.register_forward_hook(count) for module in paths]
    try:
        run_example(network, example)
    finally:
        for handle in handles:
            handle.remove()
    return elements
