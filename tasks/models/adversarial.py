"""What training a generator against a discriminator needs: losses, learning rates, and modes of the networks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

CONSTANT_PART = 2 / 3  # of the epochs, before the learning rate falls: 200 of 300


def logistic_loss(logits: Tensor, real: bool) -> Tensor:
    """Cross entropy of logits (N, 1, H, W) against `real` or not: the vanilla objective of Pix2Pix."""
    return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, float(real)).float())


def square_loss(logits: Tensor, real: bool) -> Tensor:
    """Mean squared distance of logits (N, 1, H, W) to 1 (real) or 0: the least-squares objective of CycleGAN."""
    return F.mse_loss(logits.float(), torch.full_like(logits, float(real)).float())


def constant_then_linear(epoch: int, epochs: int) -> float:
    """Factor on the learning rate in `epoch` (from 0): 1 for two thirds of the epochs, then in equal steps towards 0.

    Of 300 epochs, 1 up to the 200th, 100/101 in the 201st, 1/101 in the last.
    """
    constant = round(CONSTANT_PART * epochs)
    return 1 - max(0, epoch + 1 - constant) / (epochs - constant + 1)


def adam(networks: Iterable[nn.Module], learning_rate: float, beta1: float) -> torch.optim.Adam:
    """Adam on all parameters of the networks, in one pass over them; the second moment's decay is 0.999."""
    parameters = [parameter for network in networks for parameter in network.parameters()]
    return torch.optim.Adam(parameters, lr=learning_rate, betas=(beta1, 0.999), fused=True)


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """Gradients pass through the networks and leave none on their parameters, while a generator is trained."""
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
    """Evaluation mode without gradients, weights transformed once; modes and running statistics come back after.

    like_training: batch norms use the batch's own statistics and dropout drops, as the authors of Pix2Pix test.
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
