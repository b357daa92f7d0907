"""Plan for any network: sites found by module type and by tracing one example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from qprune.compression.activation_trace import ATTENTION, COMPUTE, Stored, Trace, traced
from qprune.compression.plan import INPUT, INPUT_OF, Plan, Site, match, weight_places
from qprune.errors import UserError

NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm),
)
_JOINS = ("cat", "stack")


def auto_plan(network: nn.Module, example: Any, include: Sequence[str] = ("**",), exclude: Sequence[str] = ()) -> Plan:
    """Plan all convolutions and linear layers, and the features that layers read (Appendix B.1).

    Weights are those of convolutions, linear layers and the projections of `nn.MultiheadAttention`, but for parameters
    that two modules share. Features are the tensors that something reads from memory, at the module that makes them,
    before a ReLU or a pooling that keeps the grid: of a residual block its sum, not the addends. All of them are
    quantized, the network's input included and its outputs not. All are pruned but those of the first and the last
    layer, in the order in which the example passes them, and those that no layer makes, such as a mean.

    A feature has no site where no module returns it or its module is called several times, unless a single layer reads
    it, which is then the site (`conv2.input`), and where its first dimension is not the batch. `coverage` lists these
    with the reason. An input of integers is no feature.

    Args:
        network: Any module.
        example: One input, as in `compress`.
        include, exclude: Globs over module paths, of layers with the features they make, and of features.

    Returns:
        The plan.

    Raises:
        UserError: The example passes no layer that can be compressed, or a glob matches nothing.
    """
    return _Planner(network, example, include, exclude).plan()


class _Planner:
    def __init__(self, network: nn.Module, example: Any, include: Sequence[str], exclude: Sequence[str]) -> None:
        self.trace: Trace = traced(network, example)
        if not self.trace.layers:
            raise UserError(
                "the example passed no convolution, no linear layer and no attention: there is nothing to compress; "
                "for layers of another kind place operators by hand, qprune.Quantizer(8).on(layer)"
            )
        self.modules = dict(network.named_modules())
        self.weights = weight_places(network)
        known = list(dict.fromkeys([INPUT, *(path for path in self.modules if path), *self.weights]))
        self.included = match(include, known, "include") | ({""} if "**" in include else set())
        self.excluded = match(exclude, known, "exclude") if exclude else set()
        self.ends = (self.trace.layers[0], self.trace.layers[-1])
        self.layers = set(self.trace.layers)

    def plan(self) -> Plan:
        sites = []
        for path, (module, name) in self.weights.items():
            if isinstance(module, COMPUTE + ATTENTION):
                chosen = self._chosen(path, {path}) and not self._is_shared(module, name)
                inner = self._layer_of(path) not in self.ends
                sites.append(Site(path, "weight", chosen and inner, chosen))
        found: dict[str, Site] = {}
        for stored in self.trace.reads:
            site = self._site(stored)
            if site is not None:
                other = found.get(site.path, site)
                found[site.path] = Site(
                    site.path, "feature", site.prune or other.prune, site.quantize or other.quantize
                )
        return Plan((*sites, *found.values()))

    def _site(self, stored: Stored) -> Site | None:
        """Return the site of a stored tensor, or None where it gets no operators or has no place for them."""
        sources = self._sources(stored)
        if not stored.readers or self._feeds_norms_only(stored) or self._is_output(stored, sources):
            return None
        prune = bool(sources - {*self.ends})
        path, quantize = self._place(stored, "grid"), True
        if path is None and stored.uses == 1 and self._reads_alone(stored.readers[0]):
            path = INPUT_OF.format(stored.readers[0])
        if path is None and prune:  # zeros outlive more functions than grids do
            path, quantize = self._place(stored, "zeros"), False
        if path is None or not self._chosen(path, sources or {stored.name, *stored.readers}):
            return None
        return Site(path, "feature", prune and path != INPUT, quantize)

    def _place(self, stored: Stored, kept: str) -> str | None:
        """Return the first module before `stored` after which every function keeps the grid, or zeros."""
        chain = [stored]
        while kept in chain[-1].keeps and len(chain[-1].inputs) == 1:
            chain.append(chain[-1].inputs[0])
        for made in reversed(chain):
            if made is self.trace.first:
                return INPUT
            for path, shape in made.outputs.items():
                if path and self.trace.calls[path] == 1 and self._is_batch(shape):
                    return path
        return None

    def _sources(self, stored: Stored) -> set[str]:
        """Return the layers whose output is in `stored`, but not by way of tensors stored before it."""
        found, waiting, seen = set(), [stored], {stored}
        while waiting:
            made = waiting.pop()
            layers = self.layers.intersection(list(made.outputs)[:1])
            if not layers and not made.fused and isinstance(self.modules.get(made.name), ATTENTION):
                layers = {made.name}
            found |= layers
            through = made.fused or made.keeps or "norm" in made.made_by or made.made_by in _JOINS
            if not layers and through:
                new = {i for i in made.inputs if i not in seen and not self.layers.intersection(i.readers)}
                seen |= new
                waiting += new
        return found

    def _feeds_norms_only(self, stored: Stored) -> bool:
        """Return whether only norms read a layer's output: then the norm's output is the feature."""
        made_by_layer = self.layers.intersection(list(stored.outputs)[:1])
        return bool(made_by_layer) and all(isinstance(self.modules[path], NORMS) for path in stored.readers)

    def _is_output(self, stored: Stored, sources: set[str]) -> bool:
        """Return whether this is the network's output, possibly before a function such as softmax."""
        return sources == {self.ends[1]} and not self.layers.intersection(stored.readers)

    def _is_batch(self, shape: tuple[int, ...]) -> bool:
        return len(shape) >= 2 and shape[0] == self.trace.batch

    def _reads_alone(self, path: str) -> bool:
        once = isinstance(self.modules[path], COMPUTE) and self.trace.calls[path] == 1
        return once and self._is_batch(self.trace.given[path])

    def _is_shared(self, module: nn.Module, name: str) -> bool:
        weight = getattr(module, name)
        return sum(p is weight for other in self.modules.values() for p in other.parameters(recurse=False)) > 1

    def _layer_of(self, path: str) -> str:
        """Return the layer that a weight belongs to: for a projection, its attention."""
        parent = path.rpartition(".")[0]
        return parent if isinstance(self.modules[parent], ATTENTION) else path

    def _chosen(self, path: str, makers: set[str]) -> bool:
        reader = path.removesuffix(".input")
        if {path, reader} & self.excluded or makers <= self.excluded:
            return False
        return bool({path, *makers} & self.included)
