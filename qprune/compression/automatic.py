"""A plan for any network: sites found by module type and by what one example shows of the data flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from qprune.compression.placement import run_example
from qprune.compression.plan import INPUT, Plan, Site, match
from qprune.errors import UserError

COMPUTE = (nn.modules.conv._ConvNd, nn.Linear)
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def automatic_plan(
    network: nn.Module, example: Any, include: Sequence[str] = ("**",), exclude: Sequence[str] = ()
) -> Plan:
    """All convolutions and linear layers, and the features they make, as the paper does it (Appendix B.1).

    Weights and features are quantized, the network's input included, its final output not; all but those of the first
    and the last layer (in the order in which the example passes them) are pruned. The feature of a layer is the output
    of the norm that reads it directly, if there is one, else its own output. Layers that the example passes several
    times get no feature site. include, exclude: globs over module paths of the layers.
    """
    layers, calls, norm_after = _trace(network, example)
    if not layers:
        raise UserError("the example passed no convolution and no linear layer: there is nothing to compress")
    paths = [path for path, module in network.named_modules() if isinstance(module, COMPUTE)]
    chosen = match(include, paths, "include") - (match(exclude, paths, "exclude") if exclude else set())
    ends = (layers[0], layers[-1])
    sites = [Site(path, "weight", path in chosen and path not in ends, path in chosen) for path in paths]
    sites.append(Site(INPUT, "feature", quantize=True))
    for path in layers[:-1]:
        feature = norm_after.get(path, path)
        if path in chosen and calls[feature] == 1:
            sites.append(Site(feature, "feature", prune=path not in ends, quantize=True))
    return Plan(tuple(sites))


def _trace(network: nn.Module, example: Any) -> tuple[list[str], dict[str, int], dict[str, str]]:
    """Compute layers in the order of their first call, calls of each path, and the norm that reads a layer directly."""
    order: list[str] = []
    calls: dict[str, int] = {}
    norm_after: dict[str, str] = {}
    # Holding the tensors keeps their ids from being used again during the pass.
    made_by: dict[int, tuple[str, Tensor]] = {}

    def watch(path: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls[path] = calls.get(path, 0) + 1
            if isinstance(module, COMPUTE):
                if path not in order:
                    order.append(path)
                made_by[id(output)] = (path, output)
            elif args and id(args[0]) in made_by:
                norm_after[made_by[id(args[0])][0]] = path

        return module.register_forward_hook(hook)

    watched = [(p, m) for p, m in network.named_modules() if isinstance(m, COMPUTE + NORMS)]
    handles = [watch(path, module) for path, module in watched]
    try:
        run_example(network, example)
    finally:
        for handle in handles:
            handle.remove()
    return order, calls, norm_after
