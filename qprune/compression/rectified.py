"""Operators that take the ReLU behind them into their own passes over memory, inside a training step.

A feature that a ReLU alone reads (a batch norm's output, in most networks) is masked, rounded and rectified in one
pass, and the gradient of all three is one pass too: what the operators cost is then saved at the ReLU. The ReLU that
the network's code calls is handed its own result. Values and gradients have the same bits as one after the other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qprune.compression.activation_trace import with_all_active
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
def rectified_features(found: Sequence[FeatureOperators]) -> Iterator[None]:
    """Around a training step, forward and backward: take the ReLUs behind `found` (of `find_rectified`) along.

    Raises RunFailure if something else than the ReLU reads such a feature after all: a network that works otherwise in
    training than it does on an example cannot have this.
    """
    waiting: dict[_Rectified, None] = {}  # in the order of their features
    hand_on = partial(_Rectified.of, waiting)

    for operators in found:
        operators.hand_on = hand_on
    try:
        yield
        if waiting:
            raise _otherwise(next(iter(waiting)).site, "none was called")
    finally:
        waiting.clear()
        for operators in found:
            operators.hand_on = None


class _Rectified(Tensor):
    """What the network's code is given in place of a feature: it can be passed to a ReLU, and asked for its shape."""

    result: Tensor
    site: str
    waiting: dict[_Rectified, None]

    @classmethod
    def of(cls, waiting: dict[_Rectified, None], result: Tensor, site: str) -> _Rectified:
        """Stands for `result`, and is in `waiting` until its ReLU is called."""
        made: _Rectified = Tensor._make_subclass(cls, result.detach())
        made.result, made.site, made.waiting = result, site, waiting
        waiting[made] = None
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        if func in _RELUS:
            given.waiting.pop(given, None)
            return given.result
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            raise _otherwise(given.site, f"{getattr(func, '__name__', func)} reads it")
        return out


def _otherwise(site: str, why: str) -> RunFailure:
    return RunFailure(
        f"the feature of {site!r} was read by one ReLU alone in a pass of the example, but in training {why}; type "
        "trainer.fuse_relu=false"
    )
