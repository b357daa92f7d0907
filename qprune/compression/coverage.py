"""Coverage: which weights and features have no operator, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from qprune.compression.activation_trace import COMPUTE, Stored, Trace, with_all_active
from qprune.compression.plan import INPUT, INPUT_OF, weight_places
from qprune.compression.prepare import FeatureOperators, find_operators


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
    """

    tensors: tuple[Uncovered, ...]
    of: dict[str, int]

    def names(self, kind: str) -> list[str]:
        """Return the names of uncovered `weight` or `feature` tensors, once per tensor."""
        return [tensor.name for tensor in self.tensors if tensor.kind == kind and not tensor.pruned]

    def __str__(self) -> str:
        heads = [f"{len(self.names(kind))} of {self.of[kind]} {kind}s" for kind in ("weight", "feature")]
        floats = sum(tensor.pruned for tensor in self.tensors)
        lines = [f"not compressed: {', '.join(heads)}{f'; pruned but float: {floats}' if floats else ''}"]
        elements: Counter[tuple[str, str, str]] = Counter()
        times: Counter[tuple[str, str, str]] = Counter()
        for tensor in self.tensors:
            key = (tensor.kind, tensor.name or "the network", tensor.reason)
            elements[key] += tensor.elements
            times[key] += 1
        for (kind, name, reason), n in times.items():
            several = f" ({n} tensors)" if n > 1 else ""
            lines.append(f"  {kind} {name}{several}, {elements[kind, name, reason]:,} elements: {reason}")
        return "\n".join(lines)


def coverage(network: nn.Module, example: Any) -> Coverage:
    """List the tensors of a prepared network that stay float and whole once all operators are active.

    Weights are parameters of two or more dimensions; features are the tensors that something reads from memory.

    Args:
        network: A network with operators.
        example: One input, as in `compress`; it sets the size of features.

    Returns:
        These tensors, with the reasons.
    """
    trace = with_all_active(network, example)
    modules = dict(network.named_modules())
    wanted = {"quantize"} if any(type(m) is FeatureOperators and m.quantizer for m in modules.values()) else set()
    features = [s for s in trace.reads if not s.operators or wanted - s.operators]
    weights, total = _weights(network)
    uncovered = [
        Uncovered(s.name, "feature", s.elements, _reason(s, trace, modules), bool(s.operators)) for s in features
    ]
    return Coverage((*weights, *uncovered), {"weight": total, "feature": len(trace.reads)})


def _weights(network: nn.Module) -> tuple[list[Uncovered], int]:
    """Return the weights without an operator, and the number of all weights."""
    compressed = {placed.path for placed in find_operators(network) if placed.kind == "weight"}
    places = weight_places(network)
    found, total = [], 0
    for name, parameter in network.named_parameters():
        plain = f".{name}".replace(".parametrizations", "").removesuffix(".original").removeprefix(".")
        site = plain.removesuffix(".weight") if plain != "weight" else ""
        if parameter.dim() < 2:
            continue
        total += 1
        if site in compressed:
            continue
        owner = network.get_submodule(plain.rpartition(".")[0])
        if isinstance(owner, nn.Embedding):
            reason = "a table of embeddings, which no automatic plan includes; quantize it by a plan with globs"
        elif site in places:
            reason = "not in the plan (excluded, or shared with another module)"
        else:
            reason = f"a parameter of {type(owner).__name__}, not the weight of a layer"
        found.append(Uncovered(plain, "weight", parameter.numel(), reason))
    return found, total


def _reason(stored: Stored, trace: Trace, modules: dict[str, nn.Module]) -> str:
    if stored.name == INPUT and not stored.made_by:
        return "the network's input" + ("" if stored is trace.first else ", not its first positional argument")
    if stored in trace.results and not stored.readers:
        return "the network's result"
    returned = {path: shape for path, shape in stored.outputs.items() if path}
    if not returned:
        reader = modules[stored.readers[0]]
        if stored.uses == 1 and isinstance(reader, COMPUTE) and trace.calls[stored.readers[0]] == 1:
            return f"not in the plan; {INPUT_OF.format(stored.readers[0])} would be its site"
        return _made_within(stored, modules[stored.within])
    path, shape = next(iter(returned.items()))
    if all(trace.calls[path] > 1 for path in returned):
        return f"{path} is called {trace.calls[path]} times; give each call a module of its own"
    if shape[:1] != (trace.batch,):
        return f"its first dimension is {shape[0] if shape else 'none'}, not the batch of {trace.batch}; put that first"
    return "not in the plan"


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
