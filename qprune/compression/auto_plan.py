"""Plan for any network: sites found by module type and by tracing one example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from qprune.compression.activation_trace import ATTENTION, COMPUTE, Stored, Trace, is_product
from qprune.compression.plan import Plan, Site, input_site, match, weight_place, weight_places
from qprune.errors import UserError

NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm),
)
_JOINS = ("cat", "stack")


def auto_plan(
    network: nn.Module,
    example: Any,
    include: Sequence[str] = ("**",),
    exclude: Sequence[str] = (),
    samples: int | None = None,
) -> Plan:
    """Plan all layers, and the features that layers read (Appendix B.1).

    Layers are convolutions, linear layers, attention, and modules of any other kind that multiply features by a
    parameter. Left out are parameters that two modules share, and those of which a layer computes another weight, as
    weight standardization does. Features are the tensors that something reads from memory, at the module that makes
    them, before a ReLU or a pooling that keeps the grid: of a residual block its sum, not the addends. All of them are
    quantized, the network's input included and its outputs not. All are pruned but those of the first and the last
    layer, in the order in which the example passes them, and those that no layer makes, such as a mean.

    A feature that no module returns has a site where a single layer reads it (`conv2.input`). At a module that is
    called several times, all calls have one set of decimals, and one mask if they have one size; else they have no
    mask. A feature has no site where its first dimension is not the batch; `coverage` lists these with the reason.
    Whole numbers become features where a layer reads them as floating point numbers.

    Args:
        network: Any module.
        example: One input, as in `compress`.
        include, exclude: Globs over module paths, of layers with the features they make, and of features.
        samples: As in `compress`.

    Returns:
        The plan.

    Raises:
        UserError: The example passes no layer that can be compressed, or does not show how many samples it holds; or a
            glob matches nothing.
    """
    return _Planner(network, Trace(network).run(example, samples), include, exclude).plan()


class _Planner:
    def __init__(self, network: nn.Module, trace: Trace, include: Sequence[str], exclude: Sequence[str]) -> None:
        self.trace = trace
        if not trace.layers:
            raise UserError(
                "the example passed no convolution, no linear layer and no attention: there is nothing to compress; "
                "for layers of another kind place operators by hand, qprune.Quantizer(8).on(layer)"
            )
        if trace.samples is None:
            raise UserError(
                "the example does not show how many samples it holds, as its arguments do not share their first "
                "dimension; give the number, for example samples=8"
            )
        self.modules = dict(network.named_modules())
        self.weights = weight_places(network)
        for site in trace.owners:
            if any(is_product(use.used_by) for use in trace.used.get(site, ())):
                self.weights[site] = weight_place(network, site)
        self.input = input_site(self.modules)
        known = list(dict.fromkeys([self.input, *(path for path in self.modules if path), *self.weights]))
        self.included = match(include, known, "include") | ({""} if "**" in include else set())
        self.excluded = match(exclude, known, "exclude") if exclude else set()
        self.ends = (trace.layers[0], trace.layers[-1])
        self.layers = set(trace.layers)
        self.owners = Counter(p for _, p in network.named_parameters(remove_duplicate=False))
        self.placed: dict[str, set[Stored]] = {}  # the tensors at the sites of modules that are called several times

    def plan(self) -> Plan:
        sites = []
        for path, (module, name) in self.weights.items():
            if isinstance(module, COMPUTE + ATTENTION) or path in self.trace.owners:
                chosen = self._chosen(path, {path}) and not self._is_shared(module, name) and self._is_plain(path)
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
        features = Plan(tuple(map(self._for_all_calls, found.values())))
        return Plan((*sites, *features.active))

    def _site(self, stored: Stored) -> Site | None:
        """Return the site of a stored tensor, or None where it gets no operators or has no place for them."""
        sources = self._sources(stored)
        if not stored.readers or self._feeds_norms_only(stored) or self._is_output(stored, sources):
            return None
        prune = bool(sources - {*self.ends})
        # Zeros outlive more functions than grids do. Operators of several calls are the last resort.
        for kept, once in (("grid", True), ("zeros", True), ("grid", False), ("zeros", False)):
            path = self._place(stored, kept, once) if prune or kept == "grid" else None
            if path is not None and self._chosen(path, sources or {stored.name, *stored.readers}):
                return Site(path, "feature", prune and path != self.input, quantize=kept == "grid")
            if path is not None:
                break
        return None

    def _place(self, stored: Stored, kept: str, once: bool) -> str | None:
        """Return the first site before `stored` after which every function keeps the grid, or zeros.

        once: whether the site's module is called once.
        """
        chain = [stored]
        while kept in chain[-1].keeps and len(chain[-1].inputs) == 1:
            chain.append(chain[-1].inputs[0])
        inputs = self.trace.passed.get(self.input, [])
        sites = [(self.input, made) for made in reversed(chain) if made in inputs]
        for made in reversed(chain):
            sites += [(path, made) for path in made.outputs if path]
        reader = stored.readers[0]
        if kept == "grid" and stored.uses == 1 and (isinstance(self.modules[reader], COMPUTE) or reader in self.layers):
            sites.append((input_site(self.modules, reader), stored))
        for site, made in sites:
            passed = self.trace.passed.get(site, [])
            complete = made in passed and len(passed) == self.trace.calls[site]
            if complete and (len(passed) == 1) == once and all(map(self.trace.is_batch, self.trace.shapes[site])):
                if not once:
                    self.placed.setdefault(site, set()).add(made)
                return site
        return None

    def _for_all_calls(self, site: Site) -> Site:
        """Return a site with what every call of its module can have."""
        if site.path not in self.placed:
            return site
        every = set(self.trace.passed[site.path]) == self.placed[site.path]
        one_size = len(self.trace.shapes[site.path]) == 1
        return replace(site, prune=site.prune and every and one_size, quantize=site.quantize and every)

    def _sources(self, stored: Stored) -> set[str]:
        """Return the layers whose output is in `stored`, but not by way of tensors stored before it."""
        found, waiting, seen = set(), [stored], {stored}
        while waiting:
            made = waiting.pop()
            layers = self._maker(made)
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
        return bool(self._maker(stored)) and all(isinstance(self.modules[path], NORMS) for path in stored.readers)

    def _is_output(self, stored: Stored, sources: set[str]) -> bool:
        """Return whether this is the network's output, possibly before a function such as softmax."""
        return sources == {self.ends[1]} and not self.layers.intersection(stored.readers)

    def _maker(self, made: Stored) -> set[str]:
        """Return the layer whose result this is, if any."""
        return self.layers.intersection(list(made.outputs)[:1] if made.layer is None else [made.layer])

    def _is_plain(self, path: str) -> bool:
        """Return whether the layer works with the weight itself, and not with what it computes of it."""
        return not any(use.changed_by for use in self.trace.used.get(path, ()))

    def _is_shared(self, module: nn.Module, name: str) -> bool:
        return self.owners[getattr(module, name)] > 1

    def _layer_of(self, path: str) -> str:
        """Return the layer that a weight belongs to: for a projection, its attention."""
        parent = path.rpartition(".")[0]
        return parent if isinstance(self.modules[parent], ATTENTION) else self.trace.owners.get(path, path)

    def _chosen(self, path: str, makers: set[str]) -> bool:
        reader = path.removesuffix(".input")
        if {path, reader} & self.excluded or makers <= self.excluded:
            return False
        return bool({path, *makers} & self.included)
