"""Plan which tensor gets which operator: globs over module paths, resolved against a network."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from qprune.compression.config import PruneConfig, QuantizeConfig, is_target
from qprune.errors import UserError, closest

INPUT = "input"  # the site of the network's input, among the feature sites
INPUT_OF = "{}.input"  # the site of what one module is given
# Weights that their module does not call `weight`, by the module's type
_OTHER_WEIGHTS = {nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")}


@dataclass(frozen=True)
class Site:
    """One tensor and the operators on it.

    Attributes:
        path: A module's path: its weight, or its output. `input` is the network's input (`.input` where a module has
            that name), `conv2.input` that of the module `conv2`, `attn.in_proj_weight` a weight by the module's own
            name for it.
        kind: `weight` or `feature`.
        prune, quantize: Whether it has a pruner, a quantizer.
    """

    path: str
    kind: str
    prune: bool = False
    quantize: bool = False

    def __str__(self) -> str:
        operators = " then ".join(word for word, on in (("prune", self.prune), ("quantize", self.quantize)) if on)
        return f"{self.kind} of {self.path or 'the network'}: {operators or 'no operator'}"


@dataclass(frozen=True)
class Plan:
    """The sites of a network in the order of its modules, weights without operators included."""

    sites: tuple[Site, ...]

    @classmethod
    def from_globs(
        cls,
        network: nn.Module,
        quantize_weights: Sequence[str] = (),
        prune_weights: Sequence[str] = (),
        quantize_features: Sequence[str] = (),
        prune_features: Sequence[str] = (),
    ) -> Plan:
        """Resolve globs against a network: `*` matches within one name, `**` crosses dots, a leading `!` excludes.

        Args:
            network: Any module.
            quantize_weights, prune_weights: Globs over modules with a weight of two or more dimensions; other
                parameters by their full names (`mixer.kernel`).
            quantize_features, prune_features: Globs over all modules (their outputs) and `input`; a glob that ends in
                `.input` is over the inputs of modules.

        Returns:
            The plan.

        Raises:
            UserError: A glob matches nothing.
        """
        layers = list(weight_places(network))
        others = {name for name, p in network.named_parameters() if p.dim() > 1} - {f"{path}.weight" for path in layers}
        layers += [name for name in (*quantize_weights, *prune_weights) if name in others and name not in layers]
        modules = [path for path, _ in network.named_modules() if path]
        inputs = [input_site(modules, path) for path in modules]
        outputs = [input_site(modules), *modules]
        chosen = {
            ("weight", "quantize"): match(quantize_weights, layers, "quantize_weights"),
            ("weight", "prune"): match(prune_weights, layers, "prune_weights"),
            ("feature", "quantize"): _match_features(quantize_features, outputs, inputs, "quantize_features"),
            ("feature", "prune"): _match_features(prune_features, outputs, inputs, "prune_features"),
        }
        sites = []
        for kind, paths in (("weight", layers), ("feature", outputs + inputs)):
            for path in paths:
                prune, quantize = (path in chosen[kind, operator] for operator in ("prune", "quantize"))
                if prune or quantize or kind == "weight":
                    sites.append(Site(path, kind, prune, quantize))
        return cls(tuple(sites))

    def restricted(self, prune: PruneConfig | None, quantize: QuantizeConfig | None) -> Plan:
        """Return the plan with the operators of these configs alone: None drops one, `targets` restricts it."""
        sites = []
        for site in self.sites:
            pruned, quantized = is_target(site.kind, prune), is_target(site.kind, quantize)
            sites.append(replace(site, prune=site.prune and pruned, quantize=site.quantize and quantized))
        return Plan(tuple(sites))

    @property
    def active(self) -> tuple[Site, ...]:
        """Sites with an operator."""
        return tuple(site for site in self.sites if site.prune or site.quantize)

    @property
    def without_operators(self) -> tuple[Site, ...]:
        """Sites without one."""
        return tuple(site for site in self.sites if not (site.prune or site.quantize))

    def counts(self) -> dict[str, int]:
        """Count weight_quantizers, weight_pruners, feature_quantizers and feature_pruners."""
        return {
            f"{kind}_{operator}s": sum(getattr(site, operator[:-1]) for site in self.sites if site.kind == kind)
            for kind in ("weight", "feature")
            for operator in ("quantizer", "pruner")
        }

    def __str__(self) -> str:
        return "\n".join(str(site) for site in self.sites)


def weight_of(module: nn.Module) -> Tensor | None:
    """Return the module's weight if it has two or more dimensions, else None."""
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.dim() >= 2 else None


def weight_places(network: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Map the path of every weight of two or more dimensions to its module and parameter name."""
    places = {}
    for path, module in network.named_modules():
        if weight_of(module) is not None:
            places[path] = (module, "weight")
        for kind, names in _OTHER_WEIGHTS.items():
            for name in names if isinstance(module, kind) else ():
                if getattr(module, name) is not None:
                    places[f"{path}.{name}".removeprefix(".")] = (module, name)
    return places


def weight_place(network: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module and the parameter name of the weight at a site."""
    parent, _, name = path.rpartition(".")
    owner = network.get_submodule(parent)
    return (network.get_submodule(path), "weight") if name in ("", *dict(owner.named_children())) else (owner, name)


def input_site(modules: Collection[str], path: str = "") -> str:
    """Return the site of the input of a module, by default of the network, among modules by path.

    That is `path.input` and `input`; where a module is called so, `path..input` and `.input`.
    """
    site = INPUT_OF.format(path) if path else INPUT
    return site if site not in modules else INPUT_OF.format(f"{path}." if path else "")


def _match_features(globs: Iterable[str], outputs: Sequence[str], inputs: Sequence[str], name: str) -> set[str]:
    globs = list(globs)
    of_modules = [glob for glob in globs if glob.endswith(".input") and glob.removeprefix("!") not in outputs]
    of_outputs = [glob for glob in globs if glob not in of_modules]
    return match(of_outputs, outputs, name) | match(of_modules, inputs, name)


def match(globs: Iterable[str], paths: Sequence[str], name: str) -> set[str]:
    """Return the paths that globs match, later globs overriding earlier ones.

    Args:
        globs: As in `Plan.from_globs`.
        paths: What they are matched against.
        name: The config key or argument, for the error.
    """
    chosen: set[str] = set()
    for glob in globs:
        pattern = _pattern(glob.removeprefix("!"), name)
        found = {path for path in paths if pattern.fullmatch(path)}
        if not found:
            raise UserError(
                f"{name}: the glob {glob!r} matches none of the network's {len(paths)} paths"
                f"{closest(glob.removeprefix('!'), paths)} ('*' stands within one name, '**' crosses dots); "
                f"the first paths are {', '.join(paths[:6])}"
            )
        chosen = chosen - found if glob.startswith("!") else chosen | found
    return chosen


def _pattern(glob: str, name: str) -> re.Pattern[str]:
    meaning = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    parts = re.split(r"(\*\*|\*|\?|\[[^\]]+\])", glob)
    legal = [meaning.get(part) or (part if re.fullmatch(r"\[[^\]]+\]", part) else re.escape(part)) for part in parts]
    try:
        return re.compile("".join(legal))
    except re.error as error:
        raise UserError(
            f"{name}: the glob {glob!r} has brackets that are not legal ({error}); between them stand single "
            "characters, as in [ab], or ranges from low to high, as in [0-4]"
        ) from error
