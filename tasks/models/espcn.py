"""ESPCN (Shi et al. 2016): super resolution whose layers all work at the low resolution."""

from __future__ import annotations

import math

from torch import Tensor, nn


class ESPCN(nn.Module):
    """(N, 1, H, W) -> (N, 1, scale * H, scale * W), luma on [0, 1]. 22,729 parameters at scale 3.

    Weights start as N(0, sqrt(2 / (out_channels * k * k))), those of the last convolution as N(0, 0.001), so that the
    untrained network's output is almost 0; biases start at 0.
    """

    def __init__(self, scale: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 64, 5, padding=2)
        self.tanh1 = nn.Tanh()
        self.conv2 = nn.Conv2d(64, 32, 3, padding=1)
        self.tanh2 = nn.Tanh()
        self.conv3 = nn.Conv2d(32, scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(scale)
        for conv in (self.conv1, self.conv2, self.conv3):
            fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
            nn.init.normal_(conv.weight, std=0.001 if conv is self.conv3 else math.sqrt(2 / fan_out))
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tanh1(self.conv1(x))
        hidden = self.tanh2(self.conv2(hidden))
        out: Tensor = self.shuffle(self.conv3(hidden))
        return out
