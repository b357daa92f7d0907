"""Put networks into a mode and back: evaluation, generation, frozen parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluate a network without gradients, then restore its mode."""
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(was_training)


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """Pass gradients through networks without leaving any on their parameters, while a generator is trained."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def generating(network: nn.Module, like_training: bool = False) -> Iterator[None]:
    """Evaluate a generator without gradients, weights computed once, then restore modes and running statistics.

    Args:
        network: The generator.
        like_training: Batch norms use the batch's own statistics and dropout drops, as the authors of Pix2Pix test.
    """
    modes = {module: module.training for module in network.modules()}
    norms = [module for module in modes if isinstance(module, nn.BatchNorm2d)]
    statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    network.eval()
    if like_training:
        for module in modes:
            module.training = isinstance(module, (nn.BatchNorm2d, nn.Dropout))
    try:
        with torch.no_grad(), parametrize.cached():
            yield
    finally:
        with torch.no_grad():
            for buffer, before in statistics:
                buffer.copy_(before)
        for module, mode in modes.items():
            module.training = mode
