"""Numbers that are not finite, traced to their layer and step once noticed.

A loss that is not finite shows when losses are averaged, at least before every checkpoint; the steps since the last
good state are then trained again, with a look at every layer.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qprune.compression.functional import all_finite
from qprune.compression.plan import INPUT
from qprune.compression.prepare import INPUT_CHILD, OUTPUT_CHILD, FeatureOperators


def numbers_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the saved parameters and buffers of floating type by name."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of tensors that hold NaN or infinity, with one wait in all."""
    named = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
    if not named:
        return []
    good = torch.stack([all_finite(tensor) for _, tensor in named]).tolist()
    return [name for (name, _), is_good in zip(named, good, strict=True) if not is_good]


@contextmanager
def watched(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[dict[str, Tensor]]:
    """Collect, by module as they end, whether outputs are finite: a bool tensor each.

    Of the operators of a feature it is the input: a quantizer would hide an infinity.
    """
    good: dict[str, Tensor] = {}

    def look(name: str, values: Any) -> None:
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                is_good = all_finite(leaf.detach())
                good[name] = good[name] & is_good if name in good else is_good

    with ExitStack() as hooks:
        for name, module in modules:
            if isinstance(module, FeatureOperators):
                handle = module.register_forward_pre_hook(lambda _, args, name=name: look(name, args))
            else:
                handle = module.register_forward_hook(lambda _, args, output, name=name: look(name, output))
            hooks.callback(handle.remove)
        yield good


@contextmanager
def watched_evaluation(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Watch features with operators, and the network's output."""
    features = [(name, module) for name, module in network.named_modules() if isinstance(module, FeatureOperators)]
    with watched([*features, ("", network)]) as good:
        yield good


def trace(task: nn.Module, finite_names: Collection[str], replay: Iterable[tuple[str, dict[str, Tensor]]]) -> str:
    """Say where the first number that is not finite appears; empty if nowhere.

    `replay` trains the steps again and yields the name of each and its losses; the tensors `finite_names` of the task
    are to stay finite.
    """
    with watched([(name, module) for name, module in task.named_modules() if name]) as good:
        for step, losses in replay:
            if bad := [name for name, is_good in good.items() if not is_good]:
                return f"; traced to {step}, where the output of {readable(bad[0])} is the first that is not finite"
            if bad := not_finite(losses.items()):
                return f"; traced to {step}, where all layers' outputs are finite and the loss {bad[0]!r} is not"
            if bad := not_finite((name, t) for name, t in numbers_of(task).items() if name in finite_names):
                return f"; traced to {step}, after whose update {readable(bad[0])} is not finite"
            good.clear()
    return ""


def readable(name: str) -> str:
    """Return a name as it was without operators; empty for the network itself."""
    name = name.replace(INPUT_CHILD, INPUT).removesuffix(f".{OUTPUT_CHILD}")
    name = re.sub(r"\.parametrizations\.(\w+)\.original\d*$", r".\1", name)
    return re.sub(r"\.parametrizations\.(\w+)\.\d+$", r".\1 (as pruned and quantized)", name)
