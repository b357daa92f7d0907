"""Numbers that are not finite: noticed where a run stops to look anyway, and traced to their layer and step afterwards.

Nothing here is part of a training step. A loss that is not finite shows when losses are averaged, which is at least
before every checkpoint; the steps since the last good state are then trained again, with a look at every layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qprune.compression.distributed import rank_and_world
from qprune.compression.functional import all_finite
from qprune.compression.plan import INPUT
from qprune.compression.prepare import INPUT_CHILD, OUTPUT_CHILD, FeatureOperators
from qprune.errors import RunFailure
from qprune.training.state import rewind

if TYPE_CHECKING:
    from qprune.training.trainer import Trainer


def numbers_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of floating type that are saved, by name."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of tensors that hold NaN or infinity; one wait on the device in all."""
    named = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point()]
    if not named:
        return []
    good = torch.stack([all_finite(tensor) for _, tensor in named]).tolist()
    return [name for (name, _), is_good in zip(named, good, strict=True) if not is_good]


@contextmanager
def watched(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[dict[str, Tensor]]:
    """Collect, by module and in the order in which they end, whether outputs are finite: a bool tensor each.

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
    """`watched` for what an evaluation must not be made of: features that are operated on, and what comes out."""
    features = [(name, module) for name, module in network.named_modules() if isinstance(module, FeatureOperators)]
    with watched([*features, ("", network)]) as good:
        yield good


def failure(trainer: Trainer, what: str) -> RunFailure:
    """The error for a number that is not finite, with layer, step and phase as far as they can be found.

    what: the number as it was noticed, for example `the loss 'l1' is nan`. Changes the state of the trainer, which
    must not be trained on.
    """
    noticed = f"{what} by step {trainer.state.step} ({trainer.phase()})"
    if rank_and_world()[1] > 1:  # the other ranks cannot be asked to train again: they may not have noticed yet
        names = not_finite(numbers_of(trainer.task).items())
        found = f"; {readable(names[0])} is not finite" if names else ""
    else:
        found = _traced(trainer, noticed, last=trainer.state.step)
    return RunFailure(
        f"{noticed}{found}; the newest checkpoint is from before; try a lower learning rate or "
        "trainer.precision=float32"
    )


def _traced(trainer: Trainer, noticed: str, last: int) -> str:
    """Train again from the last good state up to step `last`, and say where the first number that is not finite is."""
    rewind(trainer)
    told = f"{noticed}; the steps from {trainer.state.step} on are trained again to find the layer"
    Console(stderr=True, soft_wrap=True, highlight=False).print(told)
    usual = trainer.finite_names
    with watched([(name, module) for name, module in trainer.task.named_modules() if name]) as good:
        for losses in trainer.steps_until(last):
            step = f"step {trainer.state.step} ({trainer.phase()})"
            if bad := [name for name, flag in good.items() if not flag]:
                return f"; traced to {step}, where the output of {readable(bad[0])} is the first that is not finite"
            if bad := not_finite(losses.items()):
                return f"; traced to {step}, where all layers' outputs are finite and the loss {bad[0]!r} is not"
            if bad := not_finite((name, t) for name, t in numbers_of(trainer.task).items() if name in usual):
                return f"; traced to {step}, after whose update {readable(bad[0])} is not finite"
            good.clear()
    return ""


def readable(name: str) -> str:
    """The name of a module or tensor as it was before operators were placed; empty for the network itself."""
    name = name.replace(INPUT_CHILD, INPUT).removesuffix(f".{OUTPUT_CHILD}")
    name = re.sub(r"\.parametrizations\.(\w+)\.original\d*$", r".\1", name)
    return re.sub(r"\.parametrizations\.(\w+)\.\d+$", r".\1 (as pruned and quantized)", name)
