"""The PatchGAN discriminator (Isola et al. 2017), which classifies patches of 70x70 pixels."""

from __future__ import annotations

from torch import Tensor, nn

from qprune.tasks.models.resnet_generator import normalisation

SLOPE = 0.2  # of the leaky ReLU


class PatchGAN(nn.Module):
    """(N, channels, H, W) -> logits (N, 1, H/8 - 2, W/8 - 2), one per overlapping patch; sides of 24 or more.

    width: channels of the first layer. norm: `batch` or `instance`. 2,768,705 parameters with 6 channels and batch
    norm. Initial weights are torch's own.
    """

    def __init__(self, channels: int, width: int = 64, norm: str = "batch") -> None:
        super().__init__()
        bias = norm == "instance"
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for inputs, outputs, stride in ((1, 2, 2), (2, 4, 2), (4, 8, 1)):
            conv = nn.Conv2d(inputs * width, outputs * width, 4, stride=stride, padding=1, bias=bias)
            layers += [conv, normalisation(norm, outputs * width), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits
