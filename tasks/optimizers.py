"""Optimizers and learning rates that several tasks share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

CONSTANT_PART = 2 / 3  # of the epochs, before the learning rate falls: 200 of 300


def adam(networks: Iterable[nn.Module], learning_rate: float, beta1: float) -> torch.optim.Adam:
    """Build a fused Adam for all parameters of the networks, with 0.999 as the second moment's decay."""
    parameters = [parameter for network in networks for parameter in network.parameters()]
    return torch.optim.Adam(parameters, lr=learning_rate, betas=(beta1, 0.999), fused=True)


def set_learning_rate(rate: float, *optimizers: torch.optim.Optimizer) -> None:
    """Set the learning rate of all parameter groups."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def constant_then_linear(epoch: int, epochs: int) -> float:
    """Return the factor on the learning rate in `epoch` (from 0) of an adversarial training.

    It is 1 for two thirds of the epochs, then falls in equal steps towards 0. Of 300 epochs: 1 up to the 200th, 100/101
    in the 201st, 1/101 in the last.
    """
    constant = round(CONSTANT_PART * epochs)
    return 1 - max(0, epoch + 1 - constant) / (epochs - constant + 1)
