"""Initial weights that are set before operators are attached."""

from __future__ import annotations

from torch import nn


def gaussian_(network: nn.Module, deviation: float = 0.02) -> None:
    """Draw the adversarial networks' initial weights from torch's global generator, in place.

    Convolutions get N(0, deviation) and zero biases, batch norms N(1, deviation) as scale and zero as shift.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, deviation)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, deviation)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def xavier_(network: nn.Module) -> None:
    """Draw the weights of convolutions and linear layers as Glorot and Bengio (2010), uniform; biases become zero."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
