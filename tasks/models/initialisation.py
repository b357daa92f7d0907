"""Initial weights that are set before operators are attached."""

from __future__ import annotations

from torch import nn


def gaussian_(network: nn.Module, deviation: float = 0.02) -> None:
    """The adversarial networks' initial weights, in place: N(0, deviation) from torch's global generator.

    Convolutions: that, and zero biases. Batch normalisations: N(1, deviation) for the scale, zero for the shift.
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
