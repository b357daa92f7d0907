"""Operators that take the ReLU behind them into their own passes over memory, inside a training step.

A feature that a ReLU alone reads (a batch norm's output, in most networks) is masked, rounded and rectified in one
pass, and the gradient of all three is one pass too: what the operators cost is then saved at the ReLU. The ReLU that
the network's code calls is handed its own result. Values and gradients have the same bits as one after the other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from qprune.compression.dataflow import with_all_active
from qprune.compression.feature import FeatureOperators
from qprune.errors import RunFailure

_OURS = 2  # references to a tensor that nobody else holds: the variable and the argument of `getrefcount`
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


def find_rectified(network: nn.Module, example: Any) -> list[FeatureOperators]:
    """The operators of `network` whose result goes into one ReLU and nowhere else, as one pass of `example` shows.

    Nowhere else: no other function reads it, it is not returned, and nobody keeps it, a view or a copy for later.
    """
    trace = with_all_active(network, example)
    seen = [(operators, *made) for operators, made in trace.operated.items()]
    trace.operated.clear()
    trace.alive.clear()
    found = []
    while seen:
        operators, made, tensor = seen.pop()
        readers = [stored.made_by for stored in trace.met if made in stored.inputs]
        alone = made.uses == 1 and not {made} & (trace.reads.keys() | trace.results | trace.moved)
        if alone and readers in (["relu"], ["relu_"]) and sys.getrefcount(tensor) == _OURS:
            found.append(operators)
    return found


@contextmanager
def rectified_features(found: list[FeatureOperators]) -> Iterator[None]:
    """Around a training step, forward and backward: take the ReLUs behind `found` (of `find_rectified`) along.

    Raises RunFailure if something else than the ReLU reads such a feature
    after all: a network that works otherwise in training than it does on an example cannot have this.
    """
    if not found:
        yield
        return
    with _HandsOn() as mode:
        for operators in found:
            operators.rectified = mode.expect
        try:
            yield
            mode.check_none_waits()
        finally:
            for operators in found:
                operators.rectified = None


class _HandsOn(TorchFunctionMode):
    """Hands a ReLU's result to the ReLU that is called for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[int, tuple[Tensor, str]] = {}  # by id -> the tensor, alive so that the id stays its own

    def expect(self, rectified: Tensor, site: str) -> None:
        """`rectified` is what the next ReLU returns that is given it."""
        self.waiting[id(rectified)] = rectified, site

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.waiting:
            return func(*args, **kwargs)
        given = [self.waiting[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.waiting]
        if given and func in _RELUS:
            tensor, _ = given[0]
            del self.waiting[id(tensor)]
            return tensor
        out = func(*args, **kwargs)
        if given and any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            self._refuse(given[0][1], f"{getattr(func, '__name__', func)} reads it")
        return out  # a shape or a type was asked for

    def check_none_waits(self) -> None:
        """Every feature has met its ReLU."""
        for _, site in self.waiting.values():
            self._refuse(site, "none was called")

    @staticmethod
    def _refuse(site: str, why: str) -> None:
        raise RunFailure(
            f"the feature of {site!r} was read by one ReLU alone in a pass of the example, but in training {why}; type "
            "trainer.fuse_relu=false"
        )
