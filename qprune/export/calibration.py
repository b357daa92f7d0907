"""Decimal bits for features that were trained without a grid and lie between two integer kernels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qprune.compression.functional import optimal_decimal
from qprune.export.tracing import Trace

CANDIDATES = range(-8, 20)
BITS = 8


@torch.no_grad()
def missing_decimals(network: nn.Module, trace: Trace, inputs: Iterable[Tensor]) -> dict[str, int]:
    """Module path -> decimal bits of least squared error, for norms that no grid follows. `inputs`: training data."""
    paths = [node.path for node in trace.nodes if node.op == "batch_norm" and not _has_grid(trace, node.name)]
    kept: dict[str, list[Tensor]] = {path: [] for path in paths}
    handles = [
        network.get_submodule(path).register_forward_hook(lambda _m, _a, y, path=path: kept[path].append(y.flatten()))
        for path in paths
    ]
    try:
        for x in inputs:
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    return {
        path: int(optimal_decimal(torch.cat(values), BITS, decimals=CANDIDATES, rounding="nearest"))
        for path, values in kept.items()
        if values
    }


def _has_grid(trace: Trace, name: str) -> bool:
    users = trace.users(name)
    return len(users) == 1 and (users[0].op == "grid" or (users[0].op == "mask" and _has_grid(trace, users[0].name)))
