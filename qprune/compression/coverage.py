"""Coverage: which weights and features have no operator, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qprune.compression.activation_trace import (
    COMPUTE,
    FLOAT_BITS,
    RECURRENT,
    TABLES,
    Stored,
    Trace,
    WeightUse,
    is_product,
    with_all_active,
)
from qprune.compression.operator import Operator
from qprune.compression.plan import INPUT, input_site
from qprune.compression.prepare import FeatureOperators, PlacedParameter, find_operators, parameters
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer

_RESULT, _INPUT, _NOT_PLANNED = "the network's result", "the network's input;", "not in the plan"


@dataclass(frozen=True)
class Uncovered:
    """A tensor that stays float.

    Attributes:
        name: Of the parameter, or of the module that makes the feature.
        kind: `weight` or `feature`.
        elements: Its elements, of all samples of the example.
        reason: Why it has no quantizer, and what to do about it.
        pruned: Whether it has a mask.
    """

    name: str
    kind: str
    elements: int
    reason: str
    pruned: bool = False


@dataclass(frozen=True)
class Coverage:
    """The tensors of a network without an operator; `print` lists them with what to do about each.

    Attributes:
        tensors: These tensors.
        of: Number of all weights (parameters of two or more dimensions) and features.
        elements: Elements of all weights, and of all features that the network reads.
        size_bits: Their size in bits once all operators are active and every mask has its final sparsity.
    """

    tensors: tuple[Uncovered, ...]
    of: dict[str, int]
    elements: dict[str, int] = field(default_factory=dict)
    size_bits: dict[str, float] = field(default_factory=dict)

    def names(self, kind: str) -> list[str]:
        """Return the names of uncovered `weight` or `feature` tensors, once per tensor."""
        return [tensor.name for tensor in self.tensors if tensor.kind == kind and not tensor.pruned]

    def share(self, kind: str) -> float:
        """Return the fraction of the elements of `weight` or `feature` tensors that have operators, or 1 of none."""
        return self._without(kind, _RESULT)

    def reachable(self, kind: str) -> float:
        """Return the fraction that has operators or is left out by the plan."""
        return self._without(kind, _RESULT, _INPUT, _NOT_PLANNED)

    def _without(self, kind: str, *reasons: str) -> float:
        left = [t for t in self.tensors if t.kind == kind and not t.pruned and not t.reason.startswith(reasons)]
        return 1.0 - sum(t.elements for t in left) / max(1, self.elements[kind])

    def summary(self, kind: str) -> str:
        """Say in a line how many `weight` or `feature` tensors are compressed, and to which size."""
        number, before, after = self.of[kind], self.elements[kind] * FLOAT_BITS, self.size_bits[kind]
        return (
            f"{kind}s: {number - len(self.names(kind))} of {number} compressed, {self.share(kind):.1%} of the "
            f"elements; {before / 1e6:.3g} Mb become {after / 1e6:.3g} Mb"
        )

    def __str__(self) -> str:
        heads = [f"{len(self.names(kind))} of {self.of[kind]} {kind}s" for kind in ("weight", "feature")]
        floats = sum(tensor.pruned for tensor in self.tensors)
        lines = [f"not compressed: {', '.join(heads)}{f'; pruned but float: {floats}' if floats else ''}"]
        groups: dict[tuple[str, str], list[Uncovered]] = {}
        for tensor in self.tensors:
            groups.setdefault((tensor.kind, tensor.reason), []).append(tensor)
        for (kind, reason), found in groups.items():
            names = list(dict.fromkeys(tensor.name or "the network" for tensor in found))
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            several = f" ({len(found)} tensors)" if len(found) > 1 else ""
            elements = sum(tensor.elements for tensor in found)
            lines.append(f"  {kind} {', '.join(names[:3])}{more}{several}, {elements:,} elements: {reason}")
        return "\n".join(lines)


def coverage(network: nn.Module, example: Any, samples: int | None = None) -> Coverage:
    """List the tensors of a prepared network that stay float and whole once all operators are active.

    Weights are parameters of two or more dimensions; features are the tensors that something reads from memory. A
    weight counts as compressed if what the layer is given in a pass of the example lies on the weight's grid.

    Args:
        network: A network with operators.
        example, samples: As in `compress`; the example sets the size of features.

    Returns:
        These tensors, with the reasons.
    """
    trace = with_all_active(network, example, samples)
    found = [*_weights(network, trace), *_features(network, trace)]
    kinds = {kind: [each for each in found if each.tensor.kind == kind] for kind in ("weight", "feature")}
    return Coverage(
        tuple(each.tensor for each in found if each.tensor.reason),
        {kind: len(own) for kind, own in kinds.items()},
        {kind: sum(each.elements for each in own) for kind, own in kinds.items()},
        {kind: sum(each.size_bits for each in own) for kind, own in kinds.items()},
    )


@dataclass(frozen=True)
class _Found:
    tensor: Uncovered  # without a reason if it is compressed
    elements: int  # 0 if no module reads it
    size_bits: float


def _weights(network: nn.Module, trace: Trace) -> Iterator[_Found]:
    operators: dict[str, list[Operator]] = {}
    for placed in find_operators(network):
        if placed.kind == "weight":
            operators.setdefault(placed.path, []).append(placed.operator)
    places: dict[nn.Parameter, list[PlacedParameter]] = {}
    for weight in parameters(network, shared=True):
        if weight.parameter.dim() > 1:
            places.setdefault(weight.parameter, []).append(weight)
    sites = {site for site, _ in network.named_modules()}
    for parameter, [weight, *others] in places.items():
        here = operators.get(weight.site, [])
        reason = _reason_of_weight(trace.used.get(weight.site, []), here, weight.module)
        if others and not here:
            reason = f"shared with {others[0].owner}, and no operator fits both"
        name = f"{weight.site}.weight".removeprefix(".") if weight.site in sites else weight.site
        elements = parameter.numel()
        bits = FLOAT_BITS if reason else _bits_per_element(here)
        yield _Found(Uncovered(name, "weight", elements, reason), elements, elements * bits)


def _features(network: nn.Module, trace: Trace) -> Iterator[_Found]:
    modules = dict(network.named_modules())
    quantized = any(type(m) is FeatureOperators and m.quantizer is not None for m in modules.values())
    for stored in trace.reads:
        whole = stored.operators and ("quantize" in stored.operators or not quantized)
        reason = "" if whole else _reason(stored, trace, modules)
        tensor = Uncovered(stored.name, "feature", stored.elements, reason, bool(stored.operators))
        elements = stored.elements if stored.readers else 0
        yield _Found(tensor, elements, elements * stored.bits * stored.density)


def _bits_per_element(operators: list[Operator]) -> float:
    bits = next((each.bits for each in operators if isinstance(each, Quantizer)), FLOAT_BITS)
    return bits * (1 - sum(each.sparsity for each in operators if isinstance(each, Pruner)))


def _reason_of_weight(uses: list[WeightUse], operators: list[Operator], owner: nn.Module) -> str:
    """Return why a weight does not reach its layer from its operators, or '' if it does."""
    kind = type(owner).__name__.removeprefix("Parametrized")
    wanted = {"prune" if isinstance(operator, Pruner) else "quantize" for operator in operators}
    changed = sorted({use.changed_by.strip("_") for use in uses if use.changed_by})
    if isinstance(owner, RECURRENT):
        return f"{kind} reads its weights past all operators; build it of {kind}Cell, whose weights take operators"
    if changed and (not operators or any(wanted - use.operators for use in uses)):
        return (
            f"{kind} computes another weight from it ({', '.join(changed)}) and multiplies by that; put a layer with a "
            "plain weight in its place, or take a weight norm off (torch.nn.utils.parametrize.remove_parametrizations, "
            "torch.nn.utils.remove_weight_norm)"
        )
    if operators:
        if not uses:
            return "not used in a pass of the example"
        return "" if all(wanted <= use.operators for use in uses) else f"{kind} reads it past its operators"
    if isinstance(owner, TABLES):
        return "a table of embeddings, which no automatic plan includes; quantize it by a plan with globs"
    if any(is_product(use.used_by) for use in uses) or isinstance(owner, COMPUTE):
        return _NOT_PLANNED
    return f"a parameter of {kind}, not the weight of a layer"


def _reason(stored: Stored, trace: Trace, modules: dict[str, nn.Module]) -> str:
    if stored.name == INPUT and not stored.made_by:
        first = stored in trace.passed.get(input_site(modules), [])
        return f"{_INPUT} not in the plan" if first else "an input of the network, not its first positional argument"
    if stored in trace.results and not stored.readers:
        return _RESULT
    returned = {path: shape for path, shape in stored.outputs.items() if path}
    if not returned:
        reader = stored.readers[0]
        site = input_site(modules, reader)
        if stored.uses == 1 and isinstance(modules[reader], COMPUTE) and trace.calls[site] == 1:
            return f"{_NOT_PLANNED}; {site} would be its site"
        return _made_within(stored, modules[stored.within])
    path, shape = next(iter(returned.items()))
    if not trace.is_batch(shape):
        size = shape[0] if shape else "none"
        return f"its first dimension is {size}, not the batch of {trace.samples}; put that first"
    if all(trace.calls[path] > 1 for path in returned):
        return (
            f"{path} is called {trace.calls[path]} times, and not all calls are sites; give each call a module of its "
            "own"
        )
    return _NOT_PLANNED


def _made_within(stored: Stored, module: nn.Module) -> str:
    kind = type(module).__name__.removeprefix("Parametrized")
    function = "attention" if "attention" in stored.made_by else stored.made_by.strip("_")
    if type(module).__module__.startswith("torch."):
        return (
            f"made by {function} inside torch's {kind}, out of reach; a layer of your own in its place can be reached"
        )
    return (
        f"made by {function} in the forward of {kind}, and no module returns it; give the function a module of its own "
        "and call that (self.act = nn.SiLU(), for a sum self.sum = nn.Identity()), and it is found"
    )
